"""Holds the arms of one case on one backend, and runs a block of one of them when told to.

    python -m benchmarks.worker CASE [ARM ...]

Reads lines `ARM STEPS`, answers each with the median of the seconds that a step took, after one
step that is not counted. The first line it writes gives each arm's seconds for one step, after two
that compile and warm up.
"""

import json
import os
import statistics
import sys
import time

import keras

from benchmarks.cases import CASES
from benchmarks.names import DTYPE

SETTLE = 0.1


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
            seconds[name] = _timed(steps[name])
    print(json.dumps(seconds), file=answers, flush=True)
    for line in sys.stdin:
        name, count = line.rsplit(maxsplit=1)
        # Threads of the process that ran before may still be spinning for work.
        time.sleep(SETTLE)
        steps[name]()
        block = [_timed(steps[name]) for _ in range(int(count))]
        print(statistics.median(block), file=answers, flush=True)


def _timed(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
