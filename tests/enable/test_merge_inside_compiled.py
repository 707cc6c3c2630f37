"""Merging under a compiled model: it evaluates on, and refuses to train before a new compile."""

import keras
import numpy as np
import pytest
from keras import ops
from tolerances import FLOAT32_MODEL, assert_close

import keras_loraplus as klp


def compiled_parent():
    backbone = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(7, activation="tanh"), keras.layers.Dense(6)],
        name="backbone",
    )
    model = keras.Sequential([keras.Input((5,)), backbone, keras.layers.Dense(3, name="head")])
    klp.enable_lora_plus(backbone, rank=2, alpha=6, targets=".*dense.*")
    model.compile(klp.LoRAPlusAdamW(1e-2), "mse")
    rng = np.random.default_rng(0)
    data = [rng.normal(size=(8, n)).astype("float32") for n in (5, 3)]
    model.fit(*data, epochs=3, verbose=0)
    return model, backbone, data


def values(model):
    return {variable.path: ops.convert_to_numpy(variable) for variable in model.weights}


def assert_intact(model, before):
    assert set(values(model)) == set(before)
    for path, value in values(model).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)


@pytest.mark.filterwarnings("ignore:A layer's `trainable` state has changed:UserWarning")
def test_a_traced_parent_predicts_and_evaluates_on():
    model, backbone, (x, y) = compiled_parent()
    outputs, loss = model.predict(x, verbose=0), model.evaluate(x, y, verbose=0)
    kernel = ops.convert_to_numpy(backbone.layers[0].kernel)
    klp.merge_lora_plus(backbone)
    assert np.abs(ops.convert_to_numpy(backbone.layers[0].kernel) - kernel).max() > 1e-4
    assert_close(model.predict(x, verbose=0), outputs, FLOAT32_MODEL)
    assert_close(model.evaluate(x, y, verbose=0), loss, FLOAT32_MODEL)


@pytest.mark.filterwarnings("ignore:A layer's `trainable` state has changed:UserWarning")
@pytest.mark.parametrize("compiled_again", [True, False])
def test_training_on_with_the_same_optimizer_is_refused(backend, compiled_again):
    model, backbone, data = compiled_parent()
    klp.merge_lora_plus(backbone)
    before = values(model)
    if compiled_again:
        model.compile(model.optimizer, "mse")
    elif backend == "tensorflow":
        # The trace of the old compile trains the head, and a copy of A and B that counts for
        # nothing: what a stale compile does in Keras.
        model.fit(*data, verbose=0)
        assert_intact(backbone, {path: before[path] for path in values(backbone)})
        return
    with pytest.raises(ValueError, match="does not know: .*kernel.*new optimizer"):
        model.fit(*data, verbose=0)
    assert_intact(model, before)
    model.evaluate(*data, verbose=0)
    model.compile(klp.LoRAPlusAdamW(1e-2), "mse")
    model.fit(*data, verbose=0)
