"""Holds the arms of one case on one backend, and runs a block of all of them when told to.

    python -m benchmarks.worker CASE [ARM ...]

Reads lines with a number of turns. In such a block the arms take turns, there and back again, after
one step of each that is not counted; the answer is the median of the seconds that a step of each
arm took, of a model one that `fit` runs. A turn is one step, or some of an arm whose steps are much
shorter than others'; where a step is short, it begins with one that is not counted. The first line
it writes gives each arm's seconds for one step, after two that compile and warm up.
"""

import json
import os
import statistics
import sys
import time

import keras

from benchmarks.arms import Training
from benchmarks.cases import CASES
from benchmarks.names import DTYPE

SETTLE = 0.1
# A turn's steps: so many that they take this share of the longest step, up to a number.
TURN, STEPS_OF_A_TURN = 0.25, 20
# Seconds up to which a step depends on what the arm before left in the caches: on torch our
# optimizer's takes 13 % longer after another's, torch's own 8 %. For bert_wide it is all the same.
SHORT = 0.1


def use_dtype():
    """Sets the dtype policy that the environment names."""
    if os.environ.get(DTYPE):
        keras.config.set_dtype_policy(os.environ[DTYPE])


def main(case, wanted=()):
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be an answer
    use_dtype()
    steps, seconds = {}, {}
    for name, make in CASES[case]().items():
        if wanted and name not in wanted:
            continue
        steps[name] = make()
        for _ in range(3):
            (seconds[name],) = _timed(steps[name], 1)
    print(json.dumps(seconds), file=answers, flush=True)
    turn = TURN * max(seconds.values())
    repeats = {name: max(1, min(int(turn / s), STEPS_OF_A_TURN)) for name, s in seconds.items()}
    for line in sys.stdin:
        # Threads of the process that ran before may still be spinning for work.
        time.sleep(SETTLE)
        block = {name: [] for name in steps}
        for step in steps.values():
            _timed(step, 1)
        for number in range(int(line)):
            for name in list(steps)[:: -1 if number % 2 else 1]:
                uncounted = seconds[name] < SHORT
                block[name] += _timed(steps[name], repeats[name] + uncounted)[uncounted:]
        medians = {name: statistics.median(values) for name, values in block.items()}
        print(json.dumps(medians), file=answers, flush=True)


def _timed(step, number):
    """Returns the seconds of so many steps; a model's are those that its `fit` runs."""
    if isinstance(step, Training):
        return step.seconds(number)
    return [_once(step) for _ in range(number)]


def _once(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
