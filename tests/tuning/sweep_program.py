"""A sweep whose cells only write down that they ran: `python sweep_program.py STORAGE LOG`.

Every training writes a line when it starts and one when it ends. With a number in the environment
variable STUCK_AFTER, the training after so many does not end until the process is killed. With
several workers the first training waits until another process has begun one too.
"""

import os
import sys
import time

import keras_loraplus as klp

ETA_A, ETA_B, SEEDS = [1e-4, 1e-3], [1e-3, 1e-2], [0, 1]
CELLS = 2 * 4 * 2  # arms, pairs, seeds


class Training:
    """Trains nothing, and writes into a file."""

    __qualname__ = "Training"

    def __init__(self, log, stuck_after=None, wait_for_others=False):
        self.log = log
        self.left = stuck_after
        self.wait_for_others = wait_for_others

    def __call__(self, model, cell, report):
        self.write("start", cell)
        if self.left == 0:
            time.sleep(600)
        while self.wait_for_others and len(self.processes()) < 2:
            time.sleep(0.05)
        if self.left is not None:
            self.left -= 1
        time.sleep(0.1)
        self.write("end", cell)
        return {"score": -abs(cell.eta_b - 1e-2) - abs(cell.eta_a - 1e-3)}

    def processes(self):
        with open(self.log, encoding="utf-8") as file:
            return {line.split()[1] for line in file}

    def write(self, event, cell):
        name = f"{cell.arm}:{cell.eta_a:g}:{cell.eta_b:g}:{cell.seed}"
        # One write of one line to a file that is open for appending is whole.
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{event} {os.getpid()} {name}\n")


def build(cell):
    return None


def run(storage, log, stuck_after=None, n_workers=1):
    return klp.tuning.sweep(
        build,
        Training(log, stuck_after, wait_for_others=n_workers > 1),
        eta_a=ETA_A,
        eta_b=ETA_B,
        seeds=SEEDS,
        monitor="score",
        mode="max",
        storage=storage,
        # Where nobody dies nobody need be missed, however long a busy machine makes a worker wait.
        heartbeat=1 if n_workers == 1 else 60,
        n_workers=n_workers,
        progress=False,
    )


if __name__ == "__main__":
    stuck = os.environ.get("STUCK_AFTER")
    print("records", len(run(*sys.argv[1:], None if stuck is None else int(stuck)).records))
