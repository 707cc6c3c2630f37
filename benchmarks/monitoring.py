"""What `LoRAPlusMonitor` adds to training at its default, as a share of a step's time.

A measurement is timed as what it adds to the step it is made in; between two of them the callback
is timed by itself, since it takes microseconds. The share is that of `EVERY` steps with one
measurement:

    ((measured - step) + (EVERY - 1) * between) / (EVERY * step)
"""

import statistics

from benchmarks.rounds import measure, spread

# The default of the monitor's `every`, and the bar of its cost.
EVERY, SHARE = 100, 0.05


def arms(make=None):
    """Returns {arm: function that builds it and returns its step}, by default of `minilm_qv`."""
    # Imported by the process that is measured; the one that measures knows no Keras.
    from benchmarks.models import MODELS

    make = make or MODELS["minilm_qv"]
    return {
        # Timed from outside like the others, and not as `fit` runs it.
        "step": lambda: make().arms()["ours"]().__call__,
        "measured": lambda: _Monitored(make().arms()["ours"](), every=1),
        "between": lambda: _Monitored(make().arms()["ours"](), every=10**9, trains=False),
    }


class _Monitored:
    """A step with the monitor's calls around it, or these calls alone."""

    def __init__(self, step, every, trains=True):
        import keras_loraplus as klp

        self.step, self.trains, self.batch = step, trains, 0
        # The probe is as large as a batch.
        self.monitor = klp.callbacks.LoRAPlusMonitor(probe=step.x, every=every)
        self.monitor.set_model(step.model)
        step()
        self.monitor.on_train_begin()
        self.monitor.on_epoch_begin(0)
        self._once(step)

    def __call__(self):
        self._once(self.step if self.trains else None)

    def _once(self, step):
        self.monitor.on_train_batch_begin(self.batch)
        if step is not None:
            step()
        self.monitor.on_train_batch_end(self.batch, {})
        self.batch += 1


def run(options):
    """Returns {"monitor": rows}, a row a backend."""
    times = measure("monitor", options.backends, options.blocks, dtype=options.dtype)
    rows = []
    for backend in options.backends:
        seconds = {arm: times.seconds[backend, arm] for arm in ("step", "measured", "between")}
        values = shares(**seconds)
        share = statistics.median(values)
        medians = {arm: statistics.median(each) for arm, each in seconds.items()}
        rows.append(
            {
                "backend": backend,
                **{f"{arm}_ms": round(1000 * median, 4) for arm, median in medians.items()},
                "share": round(share, 5),
                "spread": round(spread(values), 3),
                "bound": SHARE,
                "met": share < SHARE,
            }
        )
    return {"monitor": rows}


def shares(step, measured, between):
    """Returns the monitor's share of a step's time, one value a round."""
    return [
        ((with_it - plain) + (EVERY - 1) * idle) / (EVERY * plain)
        for plain, with_it, idle in zip(step, measured, between, strict=True)
    ]
