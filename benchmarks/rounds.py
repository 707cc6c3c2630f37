"""Interleaved measurement: the arms take turns of some steps, the backends block by block.

Every backend has a process of its own, in which a block is some steps of every arm in turn, so that
a slow moment of the machine falls on all of them. A round takes the backends in order and then in
reverse, and an arm's time in it is the mean of its two blocks, so that a machine that slows down
steadily slows all alike. A ratio is formed within one round; what is reported is the median over
the rounds and its spread, the interquartile range over the median. Where in memory a process has
its arrays makes it faster or slower for as long as it lives (the same optimizer was measured at
1.35 and at 1.62 times another): a round of a ratio with a bound is the mean of one round in each of
several sets of processes.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys

from benchmarks.names import DTYPE, HUGE_PAGES, STEPS_AT_LEAST

# What the slowest arm's steps take of a block: so much that the clock and a passing interruption
# matter little, most where a ratio has a bound, least where a case has dozens of arms.
LONG_BLOCK_SECONDS, BLOCK_SECONDS, SHORT_BLOCK_SECONDS = 1.2, 0.4, 0.15
TURNS_AT_MOST = 200


@dataclasses.dataclass
class Times:
    """Seconds of a step of each (backend, arm), one value a round."""

    seconds: dict

    def ratios(self, ours, theirs):
        """Returns one ratio a round, or None where one of the two was not measured."""
        if ours not in self.seconds or theirs not in self.seconds:
            return None
        pairs = zip(self.seconds[ours], self.seconds[theirs], strict=True)
        return [a / b for a, b in pairs]

    def ratio(self, ours, theirs):
        """Returns {"ratio", "spread"}, or None where one of the two was not measured."""
        values = self.ratios(ours, theirs)
        if values is None:
            return None
        return {
            "ratio": round(statistics.median(values), 3),
            "spread": round(spread(values), 3),
        }

    def arms(self, case):
        """Returns a row for each arm."""
        return [
            {
                "case": case,
                "backend": backend,
                "arm": arm,
                "milliseconds": round(1000 * statistics.median(values), 3),
                "spread": round(spread(values), 3),
            }
            for (backend, arm), values in self.seconds.items()
        ]


def spread(values):
    """Interquartile range over the median."""
    quarters = statistics.quantiles(values, n=4)
    return (quarters[2] - quarters[0]) / statistics.median(values)


class Worker:
    """One process with one backend and the arms of one case."""

    def __init__(self, case, backend, arms=(), dtype=None):
        self.name = f"{case} on {backend}"
        self.backend = backend
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", case, *arms],
            env=environment(backend, dtype),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.step = {}

    def wait(self):
        """Waits until every arm has done its first steps."""
        self.step = json.loads(self._answer())

    def block(self, seconds):
        """Returns {arm: seconds of a step}, from a block in which the slowest has `seconds`."""
        turn = (1 + STEPS_AT_LEAST) * max(*self.step.values(), 1e-6)
        turns = round(seconds / turn)
        turns = min(max(turns, 1), TURNS_AT_MOST)
        self.process.stdin.write(f"{turns}\n")
        self.process.stdin.flush()
        return json.loads(self._answer())

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"The worker of {self.name} ended with {self.process.wait()}. To see why: "
                f"KERAS_BACKEND={self.backend} {' '.join(self.process.args)}"
            )
        return line

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def environment(backend, dtype=None):
    """Returns the environment of a process that measures.

    Args:
        backend: One of `BACKENDS`, with `HUGE_PAGES` behind it where Linux's allocator (glibc 2.35
            and newer) is to ask for huge pages.
        dtype: A dtype policy, or None.
    """
    name = backend.removesuffix(HUGE_PAGES)
    pages = {} if name == backend else {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return {
        **os.environ,
        **pages,
        "KERAS_BACKEND": name,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # Where several processes share a GPU none may take all of its memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        DTYPE: dtype or "",
    }


def measure(case, backends, rounds, arms=(), dtype=None, block_seconds=BLOCK_SECONDS, sets=1):
    """Returns the `Times` of a case: so many rounds, each the mean over the sets of processes."""
    measured = [
        _measure_set(case, backends, rounds, arms, dtype, block_seconds) for _ in range(sets)
    ]
    return Times(
        {
            key: [
                statistics.mean(values) for values in zip(*(s[key] for s in measured), strict=True)
            ]
            for key in measured[0]
        }
    )


def _measure_set(case, backends, rounds, arms, dtype, block_seconds):
    """Returns {(backend, arm): seconds} from a set of processes, after a round that warms up.

    The processes build their models side by side; nothing is timed before all of them wait.
    """
    workers = [Worker(case, backend, arms, dtype) for backend in backends]
    blocks = {}
    try:
        for worker in workers:
            worker.wait()
        for number in range(rounds + 1):
            for worker in workers if number == 0 else workers + workers[::-1]:
                for arm, taken in worker.block(block_seconds).items():
                    if number:
                        blocks.setdefault((worker.backend, arm), []).append(taken)
    finally:
        for worker in workers:
            worker.close()
    return {
        key: [(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=True)]
        for key, values in blocks.items()
    }
