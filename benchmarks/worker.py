"""Holds the arms of one case on one backend, and runs a block of one of them when told to.

    python -m benchmarks.worker CASE

Reads lines `ARM STEPS`, answers each with the median of the seconds that a step took, after one
step that is not counted. The first line it writes lists its arms and the seconds of each arm's
first step, compilation included.
"""

import json
import statistics
import sys
import time

from benchmarks.cases import CASES

SETTLE = 0.25


def main(case):
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be an answer
    steps, first = {}, {}
    for name, make in CASES[case]().items():
        steps[name] = make()
        start = time.perf_counter()
        steps[name]()
        first[name] = time.perf_counter() - start
        steps[name]()
    print(json.dumps({"first_step": first}), file=answers, flush=True)
    for line in sys.stdin:
        name, count = line.split()
        # Threads of the process that ran before may still be spinning for work.
        time.sleep(SETTLE)
        steps[name]()
        seconds = []
        for _ in range(int(count)):
            start = time.perf_counter()
            steps[name]()
            seconds.append(time.perf_counter() - start)
        print(statistics.median(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
