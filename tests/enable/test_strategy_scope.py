"""Adapted models under `tf.distribute.MirroredStrategy`, on two virtual devices."""

import keras
import numpy as np
import pytest
from optimizer_cases import run_python
from tolerances import FLOAT32, FUSED_20_STEPS, assert_close

import keras_loraplus as klp

if keras.backend.backend() != "tensorflow":
    pytest.skip("tf.distribute is TensorFlow's", allow_module_level=True)

pytestmark = pytest.mark.devices

SETUP = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
import os, keras, numpy as np, pytest
import keras_loraplus as klp
from lora_cases import all_factors, snapshot
from tiny_models import compile_model, features, fit, functional, labels, text, tokens
"""

MODEL = """
def adapted():
    keras.utils.set_random_seed(0)
    model = text()
    klp.enable_lora_plus(model, rank=2, targets=["table", "hidden", ".*attention/query"])
    compile_model(model, klp.LoRAPlusAdamW(1e-2, weight_decay=0.1, global_clipnorm=0.05))
    return model

def trained(model, folder):
    saved = klp.callbacks.AdapterCheckpoint(os.path.join(folder, "run.safetensors"))
    losses = model.fit(tokens(), labels(), batch_size=4, epochs=3, shuffle=False, verbose=0,
                       callbacks=[saved]).history["loss"]
    assert model.fit(tokens(), labels(), epochs=3, verbose=0, callbacks=[saved]).epoch == []
    klp.save_adapter(model, os.path.join(folder, "adapter.safetensors"))
    outputs = model.predict(tokens(), verbose=0)
    with klp.adapters_disabled(model):
        assert np.abs(model.predict(tokens(), verbose=0) - outputs).max() > 1e-3
    return {"losses": losses, "outputs": outputs,
            **{v.path.replace("/", "|"): v.numpy() for v in model.trainable_variables}}
"""

FIT = """
with strategy.scope():
    model = adapted()
found = trained(model, FOLDER)
klp.merge_lora_plus(model)
found["merged"] = model.predict(tokens(), verbose=0)
np.savez(os.path.join(FOLDER, "out.npz"), **found)
"""

REFUSALS = """
def refused(action, model, match):
    classes = [type(layer) for layer in model._flatten_layers()]
    values, flags = snapshot(model.weights), [v.trainable for v in model.weights]
    with pytest.raises(ValueError, match=match):
        action()
    assert classes == [type(layer) for layer in model._flatten_layers()]
    assert flags == [v.trainable for v in model.weights] and len(flags) == len(values)
    for value, variable in zip(values, model.weights):
        np.testing.assert_array_equal(variable.numpy(), value)

path = os.path.join(FOLDER, "adapter.safetensors")
source = functional()
klp.enable_lora_plus(source, rank=2)
klp.save_adapter(source, path)

with strategy.scope():
    model = functional()
    compile_model(model)
inside = r"MirroredStrategy.*with strategy.scope\\(\\)"
refused(lambda: klp.enable_lora_plus(model, rank=2), model, inside)
refused(lambda: klp.load_adapter(model, path), model, inside)
first = model.get_layer("first")
refused(lambda: klp.layers.LoRAPlusDense.from_layer(first, rank=2), model, inside)
fit(model, features())  # the compiled state was kept

plain = functional()
with strategy.scope():
    refused(lambda: klp.enable_lora_plus(plain, rank=2), plain, r"Leave the .with strategy.scope")
klp.enable_lora_plus(plain, rank=2)

with strategy.scope():
    klp.load_adapter(model, path)
    compile_model(model, klp.LoRAPlusAdamW(1e-2))
before = snapshot(all_factors(model))
fit(model, features(), epochs=2)
assert len(before) == 4
for value, variable in zip(before, all_factors(model)):
    assert np.all(variable.numpy() != value), variable.path

# Settings that need a sum over replicas inside of a condition.
for setting in ({"gradient_accumulation_steps": 2},
                {"use_ema": True, "ema_overwrite_frequency": 2}):
    with strategy.scope():
        model = functional()
        compile_model(model, klp.LoRAPlusAdamW(1e-2, **setting))
    refused(lambda: fit(model, features()), model, list(setting)[-1] + "=2 cannot be used")
"""


def test_a_fit_equals_that_on_one_device(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir(), one.mkdir()
    run_python(f"FOLDER = {str(two)!r}\n{SETUP}{MODEL}{FIT}")
    scope: dict = {}
    imports = SETUP[SETUP.index("import os") :]
    exec(imports + MODEL, scope)
    model = scope["adapted"]()
    start = [v.numpy() for v in model.trainable_variables]
    right = scope["trained"](model, str(one))
    klp.load_adapter(model, two / "adapter.safetensors")
    with np.load(two / "out.npz") as found:
        assert_close(found["losses"], right.pop("losses"), 10 * FLOAT32)
        assert_close(found["outputs"], right.pop("outputs"), 10 * FUSED_20_STEPS)
        assert_close(found["merged"], found["outputs"], 10 * FLOAT32)
        for before, (name, value), variable in zip(
            start, right.items(), model.trainable_variables, strict=True
        ):
            assert_close(found[name], value, 10 * FUSED_20_STEPS)
            assert np.any(value != before)
            np.testing.assert_array_equal(variable.numpy(), found[name])


def test_another_strategy_is_refused_and_nothing_changed(tmp_path):
    run_python(f"FOLDER = {str(tmp_path)!r}\n{SETUP}{REFUSALS}")
