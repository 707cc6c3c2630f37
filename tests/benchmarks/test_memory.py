"""What the suite says of memory: the resident set follows what is alive; recomputing saves some."""

import subprocess
import sys

import keras
import numpy as np
import pytest

from benchmarks.cases import CASES
from benchmarks.checkpointing import MODES, UNFILTERED, checkpointed
from benchmarks.names import CHECKPOINTING

SIZES = {"layers": 2, "width": 8, "heads": 2, "inner": 16, "batch": 2, "length": 4}
# 1,000 arrays of 100 kB of which all but the last, which lies on top of the heap, are given back.
FREED = """
import sys
import numpy as np
from benchmarks import resident
if sys.argv[1] == "follow":
    resident.follow_what_lives()
resident.reset_peak()
before = resident.peak()
arrays = [np.ones(100_000, np.uint8) for _ in range(1000)]
del arrays[:-1]
resident.reset_peak()
print(resident.peak() - before)
"""


@pytest.mark.parametrize(("malloc", "least", "most"), [("follow", -1e6, 5e6), ("as_is", 5e7, 2e8)])
def test_what_is_freed_is_not_resident_any_more(malloc, least, most):
    """As malloc is, it stays so: the control."""
    done = subprocess.run(
        [sys.executable, "-c", FREED, malloc], capture_output=True, text=True, check=True
    )
    assert least < int(done.stdout) < most


def test_what_is_recomputed_changes_no_loss(backend):
    wanted = CHECKPOINTING if backend == "torch" else MODES
    assert tuple(CASES["checkpointing"]()) == wanted
    losses = {}
    for mode in CHECKPOINTING:
        step = checkpointed(mode, SIZES)
        losses[mode] = [float(np.ravel(step())[0]) for _ in range(3)]
        assert len(set(losses[mode])) == 3
    for mode in CHECKPOINTING[1:]:
        np.testing.assert_allclose(losses[mode], losses["none"], rtol=1e-6)


def test_tracebacks_are_unfiltered_during_the_steps_only(monkeypatch):
    seen = []

    def fails(*arguments, **keywords):
        seen.append(keras.config.is_traceback_filtering_enabled())
        raise RuntimeError("no step")

    steps = {mode: checkpointed(mode, SIZES) for mode in ("blocks", UNFILTERED)}
    for method in ("train_on_batch", "fit"):
        monkeypatch.setattr(keras.Model, method, fails)
    for step in steps.values():
        for run in (step, lambda step=step: step.seconds(1)):
            with pytest.raises(RuntimeError, match="no step"):
                run()
            assert keras.config.is_traceback_filtering_enabled()
    assert seen == [True, True, False, False]
