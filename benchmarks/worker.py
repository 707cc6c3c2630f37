"""Holds the arms of one case on one backend, and runs a block of all of them when told to.

    python -m benchmarks.worker CASE [ARM ...]

Reads lines with a number of turns. In such a block the arms take turns, in order and in reverse. A
turn is one step that is not counted and then some that are, so that what is timed always follows a
step of the same arm, as it does for a user: what another arm leaves in the caches costs the next
step up to 13 %, and an order there and back would spare that to its first and last arm, half of the
time. The answer is the median of the seconds that a step of each arm took, of a model one that
`fit` runs. The first line it writes gives each arm's seconds for one step, after two that compile
and warm up.
"""

import json
import os
import statistics
import sys
import time

import keras

from benchmarks.arms import Training
from benchmarks.cases import CASES
from benchmarks.names import DTYPE, STEPS_AT_LEAST

SETTLE = 0.1
# The steps of a turn that count: as many as take this share of the longest, up to a number.
TURN, STEPS_AT_MOST = 0.25, 20


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
    repeats = {
        name: min(max(int(turn / one), STEPS_AT_LEAST), STEPS_AT_MOST)
        for name, one in seconds.items()
    }
    order = list(steps)
    for line in sys.stdin:
        # Threads of the process that ran before may still be spinning for work.
        time.sleep(SETTLE)
        block = {name: [] for name in steps}
        for _ in range(int(line)):
            for name in order:
                block[name] += _timed(steps[name], 1 + repeats[name])[1:]
            order.reverse()
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
