"""Two devices with half a batch each train as one device with the whole batch."""

import keras
import numpy as np
import pytest
from optimizer_cases import fit, make_model, run_python, trainable_values
from tolerances import FUSED_20_STEPS, assert_close

from keras_loraplus.optimizers import LoRAPlusAdamW

BACKEND = keras.backend.backend()
if BACKEND == "torch":
    pytest.skip("keras.distribution and tf.distribute are not on torch", allow_module_level=True)

ARGUMENTS = {"lr_ratio": 8.0, "weight_decay": 0.1, "lr_multipliers": {".*head/.*": 2.0}}

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
import numpy as np
from keras_loraplus.optimizers import LoRAPlusAdamW
from optimizer_cases import fit, make_model, trainable_values
with scope():
    model = make_model()
    optimizer = LoRAPlusAdamW(1e-2, **ARGUMENTS)
    model.compile(optimizer, loss="mse")
fit(model, epochs=3)
assert [row.multiplier for row in optimizer.assignments()] == [1.0, 8.0, 2.0, 2.0]
np.savez(OUT, **trainable_values(model))
"""


@pytest.mark.parametrize("extra", [{}, {"use_ema": True, "ema_momentum": 0.5}])
def test_two_devices_equal_one(tmp_path, extra):
    arguments = {**ARGUMENTS, **extra}
    setup = MIRRORED if BACKEND == "tensorflow" else DATA_PARALLEL
    out = str(tmp_path / "out.npz")
    run_python(f"OUT = {out!r}\nARGUMENTS = {arguments!r}\n{setup}{TRAIN}")
    model = make_model()
    start = trainable_values(model)
    model.compile(LoRAPlusAdamW(1e-2, **arguments), loss="mse")
    fit(model, epochs=3)
    with np.load(out) as two:
        for name, right in trainable_values(model).items():
            # Two half sums are rounded otherwise than one sum.
            assert_close(two[name], right, 10 * FUSED_20_STEPS)
            assert np.all(right != start[name])
