"""A sweep one of whose cells takes its process with it: `python doomed_program.py STORAGE LOG`."""

import os
import sys

from sweep_program import Training, build

import keras_loraplus as klp

RATES, DOOMED = [1e-4, 1e-3, 1e-2], 1e-3


class Dying(Training):
    """Writes down that a training began, and dies of one of them."""

    __qualname__ = "Dying"

    def __call__(self, model, cell, report):
        if cell.eta_a != DOOMED:
            return super().__call__(model, cell, report)
        self.write("start", cell)
        os._exit(7)


def run(storage, log, max_deaths=1):
    return klp.tuning.sweep(
        build,
        Dying(log),
        eta_a=RATES,
        lr_ratio=8.0,
        lora=False,
        monitor="score",
        mode="max",
        storage=storage,
        heartbeat=1,
        max_deaths=max_deaths,
        progress=False,
    )


if __name__ == "__main__":
    run(*sys.argv[1:])
