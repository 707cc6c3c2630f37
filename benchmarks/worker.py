"""Holds the arms of one case on one backend, and runs a block of one of them when told to.

    python -m benchmarks.worker CASE

Reads lines `ARM STEPS`, answers each with the seconds a step took. The first line it writes
lists its arms and the seconds of each arm's first step, compilation included.
"""

import json
import sys
import time

from benchmarks.cases import CASES


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
        start = time.perf_counter()
        for _ in range(int(count)):
            steps[name]()
        print((time.perf_counter() - start) / int(count), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
