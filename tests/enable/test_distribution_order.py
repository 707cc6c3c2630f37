"""Adapting before and after a model is distributed over 8 devices, in and out of the scope."""

import json

import keras
import numpy as np
import pytest
from optimizer_cases import run_python
from tolerances import ONE_DEVICE_LOSS, assert_close

if keras.backend.backend() != "jax":
    pytest.skip("keras.distribution is on JAX only", allow_module_level=True)

pytestmark = pytest.mark.devices

CODE = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import contextlib, json, os
import keras
import numpy as np
import keras_loraplus as klp
from lora_cases import all_factors, randomize_factors, snapshot
from tiny_models import compile_model, features, functional, labels

devices = keras.distribution.list_devices("cpu")
mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
layouts = keras.distribution.LayoutMap(mesh)
layouts[".*first.*kernel.*"] = (None, "model")
layouts[".*second.*kernel.*"] = ("model", None)
DISTRIBUTIONS = {
    "DataParallel": keras.distribution.DataParallel(devices=devices),
    "ModelParallel": keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"),
}
nowhere = contextlib.nullcontext

def base():
    keras.utils.set_random_seed(0)
    return functional()

def enable(model):
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    return model

def train(model):
    compile_model(model, klp.LoRAPlusAdamW(1e-2, global_clipnorm=0.5))
    fitted = model.fit(features(16), labels(16), batch_size=8, epochs=3, shuffle=False, verbose=0)
    return fitted.history["loss"]

def where(model):
    return {v.path.split("/", 1)[-1] if v.path.count("/") > 1 else v.path:
            [list(v.value.addressable_shards[0].data.shape), len(v.value.sharding.device_set)]
            for v in model.weights}

def after(scope, outside):
    with scope():
        model = base()
        if not outside:
            enable(model)
    if outside:
        enable(model)
    with scope():
        return model, train(model)

def after_and_train_outside(scope):
    with scope():
        model = base()
    enable(model)
    return model, train(model)

def before_by_adapter(scope):
    klp.save_adapter(enable(base()), ADAPTER)
    with scope():
        model = klp.load_adapter(base(), ADAPTER)
        return model, train(model)

def before_by_file(scope):
    enable(base()).save(KERAS)
    with scope():
        model = keras.models.load_model(KERAS)
        return model, train(model)

def before_by_clone(scope):
    model = enable(base())
    values = model.get_weights()
    with scope():
        twin = keras.models.clone_model(model)
        twin.set_weights(values)
        return twin, train(twin)

def with_dropout(scope):
    with scope():
        model = base()
    klp.enable_lora_plus(model, rank=2, dropout=0.5)
    randomize_factors(model)
    with scope():
        losses = train(model)
    states = [v.value for v in model.non_trainable_variables if "seed" in v.path]
    assert len(states) == 2
    assert all(s.sharding.is_fully_replicated and len(s.sharding.device_set) == 8 for s in states)
    return model, losses

WAYS = {
    "after, inside": lambda scope: after(scope, False),
    "after, outside": lambda scope: after(scope, True),
    "after, all outside": after_and_train_outside,
    "before, by adapter file": before_by_adapter,
    "before, by .keras file": before_by_file,
    "before, by clone": before_by_clone,
    "dropout": with_dropout,
}

def refused(distribution):
    model = base()
    names = [v.path for v in model.weights]
    with distribution.scope():
        for action in (
            lambda: klp.enable_lora_plus(model, rank=2),
            lambda: klp.load_adapter(model, ADAPTER),
            lambda: klp.layers.LoRAPlusDense.from_layer(model.get_layer("first")),
        ):
            try:
                action()
            except ValueError as error:
                assert "with distribution.scope():" in str(error), error
            else:
                raise AssertionError("not refused")
    assert [v.path for v in model.weights] == names
    assert all(v.trainable for v in model.weights)
    return train(model)

result = {"one": train(enable(base())), "plain": train(base())}
for name, distribution in DISTRIBUTIONS.items():
    for way, run in WAYS.items():
        model, losses = run(distribution.scope)
        result[f"{name} {way}"] = [losses, where(model)]
    result[f"{name} refused"] = refused(distribution)
print("RESULT" + json.dumps(result))
"""

WAYS = [
    "after, inside",
    "after, outside",
    "after, all outside",
    "before, by adapter file",
    "before, by .keras file",
    "before, by clone",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    files = f"ADAPTER = {str(folder / 'a.safetensors')!r}\nKERAS = {str(folder / 'm.keras')!r}\n"
    printed = run_python(files + CODE)
    (line,) = [line for line in printed.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.parametrize("distribution", ["DataParallel", "ModelParallel"])
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_places(distribution, way, found):
    losses, where = found[f"{distribution} {way}"]
    assert losses[0] - losses[-1] > 1e-2
    assert_close(losses, found["one"], ONE_DEVICE_LOSS)
    assert {devices for _, devices in where.values()} == {8}
    split = distribution == "ModelParallel"
    pieces = {path: shape for path, (shape, _) in where.items()}
    assert pieces["first/kernel"] == ([6, 2] if split else [6, 8])
    assert pieces["first/lora_kernel_a"] == [6, 2]
    assert pieces["first/lora_kernel_b"] == ([2, 2] if split else [2, 8])
    assert pieces["second/lora_kernel_a"] == ([2, 2] if split else [8, 2])
    assert pieces["second/lora_kernel_b"] == [2, 8]
    assert pieces["first/lora_scaling"] == []


@pytest.mark.parametrize("distribution", ["DataParallel", "ModelParallel"])
def test_dropout_draws_on_every_device(distribution, found):
    losses, _ = found[f"{distribution} dropout"]
    assert np.isfinite(losses).all() and losses != found["one"]


@pytest.mark.parametrize("distribution", ["DataParallel", "ModelParallel"])
def test_a_model_made_before_the_distribution_is_refused_and_still_trains(distribution, found):
    assert found[f"{distribution} refused"] == found["plain"]
