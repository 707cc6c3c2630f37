"""P10: two devices with half a batch each train as one device with the whole batch."""

import keras
import numpy as np
import pytest
from optimizer_cases import fit, make_model, run_python, trainable_values
from tolerances import FLOAT32, FUSED_20_STEPS, assert_close, relative_error

from keras_loraplus.optimizers import LoRAPlusAdamW

BACKEND = keras.backend.backend()
if BACKEND == "torch":
    pytest.skip("keras.distribution and tf.distribute are not on torch", allow_module_level=True)

ARGUMENTS = {"lr_ratio": 8.0, "weight_decay": 0.1, "lr_multipliers": {".*head/.*": 2.0}}

# Norms and entries of the gradients are above these in every step.
RUNS = {
    "plain": {},
    "averaged": {"use_ema": True, "ema_momentum": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.05},
    "clipnorm": {"clipnorm": 0.02},
    "clipvalue": {"clipvalue": 0.005},
}

MIRRORED = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
scope = strategy.scope
"""

DATA_PARALLEL = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
import contextlib, keras
devices = keras.distribution.list_devices("cpu")
assert len(devices) == 2
keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
scope = contextlib.nullcontext
"""

TRAIN = """
import keras
import numpy as np
from keras_loraplus.optimizers import LoRAPlusAdamW
from optimizer_cases import fit, make_model, trainable_values
found = {}
def train(name, make_optimizer):
    with scope():
        model = make_model()
        optimizer = make_optimizer()
        model.compile(optimizer, loss="mse")
    found[name + " loss"] = fit(model, epochs=3).history["loss"]
    found.update({f"{name} {key}": value for key, value in trainable_values(model).items()})
    return optimizer
for name, extra in RUNS.items():
    optimizer = train(name, lambda: LoRAPlusAdamW(1e-2, **ARGUMENTS, **extra))
    assert [row.multiplier for row in optimizer.assignments()] == [1.0, 8.0, 2.0, 2.0]
train("stock", lambda: keras.optimizers.AdamW(1e-2, global_clipnorm=0.05))
np.savez(OUT, **found)
"""


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    """Losses and weights of all runs on two devices, from one process."""
    setup = MIRRORED if BACKEND == "tensorflow" else DATA_PARALLEL
    out = str(tmp_path_factory.mktemp("two") / "out.npz")
    run_python(f"OUT = {out!r}\nRUNS = {RUNS!r}\nARGUMENTS = {ARGUMENTS!r}\n{setup}{TRAIN}")
    with np.load(out) as found:
        return dict(found)


def on_one_device(optimizer):
    model = make_model()
    start = trainable_values(model)
    model.compile(optimizer, loss="mse")
    losses = fit(model, epochs=3).history["loss"]
    return losses, trainable_values(model), start


@pytest.mark.parametrize("run", RUNS)
def test_two_devices_equal_one(run, two_devices):
    losses, values, start = on_one_device(LoRAPlusAdamW(1e-2, **ARGUMENTS, **RUNS[run]))
    # Two half sums are rounded otherwise than one sum.
    assert_close(two_devices[f"{run} loss"], losses, 10 * FLOAT32)
    for name, right in values.items():
        assert_close(two_devices[f"{run} {name}"], right, 10 * FUSED_20_STEPS)
        assert np.all(right != start[name])
        if "clip" in run:
            assert np.any(two_devices[f"{run} {name}"] != two_devices[f"plain {name}"])


def test_clipping_before_the_sum_would_be_seen(two_devices):
    """Stock Keras clips what each replica of a `MirroredStrategy` has; JAX clips the whole."""
    _, values, _ = on_one_device(keras.optimizers.AdamW(1e-2, global_clipnorm=0.05))
    errors = [relative_error(two_devices[f"stock {name}"], right) for name, right in values.items()]
    if BACKEND == "tensorflow":
        assert max(errors) > 1e-3
    else:
        assert max(errors) <= 10 * FUSED_20_STEPS
