"""Rule 2: the frozen weights never change and stay frozen."""

import keras
import numpy as np
import pytest
from lora_cases import ONE_OF_EACH, all_factors, ids, snapshot
from tiny_models import (
    MODELS,
    compile_model,
    features,
    fit,
    functional,
    labels,
    normalised,
    sequences,
)

import keras_loraplus as klp


def frozen(model):
    trained = {id(v) for v in model.trainable_variables}
    return [v for v in model.weights if id(v) not in trained]


@pytest.mark.parametrize("name", MODELS)
def test_fit_changes_factors_and_head_and_nothing_else(name):
    make, inputs = MODELS[name]
    model = make()
    klp.enable_lora_plus(model, rank=2)
    still, moving = frozen(model), model.trainable_variables
    names = {v.path.split("/")[-1] for v in moving if "head" not in v.path}
    assert names and names <= {
        "lora_kernel_a",
        "lora_kernel_b",
        "lora_embeddings_a",
        "lora_embeddings_b",
    }
    before_still, before_moving = snapshot(still), snapshot(moving)
    compile_model(model, klp.LoRAPlusAdamW(1e-2, lr_ratio=4.0))
    fit(model, inputs(), epochs=2)
    for variable, value in zip(still, before_still, strict=True):
        if "seed" not in variable.path:
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    for variable, value in zip(moving, before_moving, strict=True):
        assert not np.array_equal(keras.ops.convert_to_numpy(variable), value), variable.path


def test_batch_normalisation_is_frozen_in_training():
    model = normalised()
    klp.enable_lora_plus(model, rank=2)
    norm = model.get_layer("batch_norm")
    before = snapshot(norm.weights)
    inference = keras.ops.convert_to_numpy(model(sequences()))
    training = keras.ops.convert_to_numpy(model(sequences(), training=True))
    np.testing.assert_array_equal(training, inference)
    compile_model(model)
    fit(model, sequences(), epochs=2)
    for variable, value in zip(norm.weights, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)


def test_the_batch_normalisation_test_can_fail():
    model = normalised()
    norm = model.get_layer("batch_norm")
    before = snapshot([norm.moving_mean])[0]
    compile_model(model)
    fit(model, sequences())
    assert not np.array_equal(keras.ops.convert_to_numpy(norm.moving_mean), before)


def test_spectral_normalisation_is_frozen_in_training():
    inputs = keras.Input((8, 4))
    wrapped = keras.layers.SpectralNormalization(keras.layers.Dense(5, name="wrapped"))
    x = keras.layers.Dense(4, name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(wrapped(x)[:, 0]))
    report = klp.enable_lora_plus(model, rank=2)
    assert [layer.path for layer in report.adapted] == ["hidden"]
    assert "rewrites its kernel" in str(report)
    before = snapshot(wrapped.weights)
    model.trainable = False
    model.trainable = True
    compile_model(model)
    fit(model, sequences())
    for variable, value in zip(wrapped.weights, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)


@pytest.mark.parametrize("name", MODELS)
def test_toggling_trainable_leaves_frozen_weights_frozen(name):
    make, inputs = MODELS[name]
    model = make()
    klp.enable_lora_plus(model, rank=2)
    expected = [v.path for v in model.trainable_variables]
    still = frozen(model)
    model.trainable = False
    assert model.trainable_variables == []
    model.trainable = True
    assert sorted(v.path for v in model.trainable_variables) == sorted(expected)
    before = snapshot(still)
    compile_model(model)
    fit(model, inputs())
    for variable, value in zip(still, before, strict=True):
        if "seed" not in variable.path:
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids(ONE_OF_EACH))
def test_toggling_a_single_layer(case):
    layer = case.make()
    case.call(layer)
    expected = [v.name for v in layer.trainable_variables]
    assert {v.name for v in layer.adapter_variables().values()} <= set(expected)
    assert "kernel" not in expected and "embeddings" not in expected
    layer.trainable = False
    layer.trainable = True
    assert [v.name for v in layer.trainable_variables] == expected
    assert not getattr(layer, layer._factors()[0].kernel).trainable


def test_torch_has_no_gradient_for_frozen_weights(backend):
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    if backend != "torch":
        # What torch says by requires_grad, the other backends say by the list of variables alone.
        assert not any("kernel" == v.name and v.trainable for v in model.layers[1].weights)
        return
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss(labels(), model(features())).backward()
    for variable in frozen(model):
        assert not variable.value.requires_grad, variable.path
        assert variable.value.grad is None, variable.path
    for variable in all_factors(model):
        assert variable.value.requires_grad and variable.value.grad is not None, variable.path
    parameters = {id(p) for p in model.parameters() if p.requires_grad}
    assert parameters == {id(v.value) for v in model.trainable_variables}
