"""A sweep in a process of its own: `python sweep_program.py STORAGE LOG RESULT`.

Every training writes a line when it starts and one when it ends. It takes a tenth of a second; the
cell in the environment variable STUCK_CELL takes for ever, until the process is killed.
"""

import os
import sys
import time

import keras_loraplus as klp

STORAGE, LOG, RESULT = sys.argv[1:]
ETA_A, ETA_B, SEEDS = [1e-4, 1e-3, 1e-2], [1e-3, 1e-2], [0, 1]


def write(event, cell):
    # One write of one line to a file that is open for appending is whole.
    with open(LOG, "a", encoding="utf-8") as file:
        file.write(f"{event} {os.getpid()} {name(cell)}\n")


def name(cell):
    return f"{cell.arm}:{cell.eta_a:g}:{cell.eta_b:g}:{cell.seed}"


def train(model, cell, report):
    write("start", cell)
    if os.environ.get("STUCK_CELL") == name(cell):
        time.sleep(600)
    time.sleep(0.1)
    write("end", cell)
    return {"score": -abs(cell.eta_b - 1e-2) - abs(cell.eta_a - 1e-3)}


if __name__ == "__main__":
    result = klp.tuning.sweep(
        lambda cell: None,
        train,
        eta_a=ETA_A,
        eta_b=ETA_B,
        seeds=SEEDS,
        monitor="score",
        mode="max",
        storage=STORAGE,
        heartbeat=1,
        progress=False,
    )
    result.save(RESULT)
