"""Rule 10, K03a: a saved model with adapters comes back whole and trains on."""

import copy

import keras
import numpy as np
import pytest
from lora_cases import all_factors, randomize_factors, snapshot
from tiny_models import MODELS, compile_model, features, filled, fit, functional

import keras_loraplus as klp


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def adapted(name):
    make, inputs = MODELS[name]
    model = make()
    klp.enable_lora_plus(model, rank=2, alpha=5, scaling="rslora", dropout=0.1)
    randomize_factors(model)
    return model, inputs()


def names(variables):
    """Returns "layer/variable": Keras gives a Sequential's layers another path once loaded."""
    return ["/".join(v.path.split("/")[-2:]) for v in variables]


def named(model):
    """Returns {name: value} of everything but random states."""
    weights = [v for v in model.weights if "seed" not in v.path]
    return dict(zip(names(weights), map(to_numpy, weights), strict=True))


def assert_same_model(twin, model, inputs):
    expected, actual = named(model), named(twin)
    assert list(actual) == list(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)
    np.testing.assert_array_equal(to_numpy(twin(inputs)), to_numpy(model(inputs)))
    assert names(twin.trainable_variables) == names(model.trainable_variables)
    layers = [(m, t) for m, t in zip(model._flatten_layers(), twin._flatten_layers(), strict=True)]
    for mine, theirs in layers:
        assert klp.layers.is_adapted(mine) == klp.layers.is_adapted(theirs)
        if klp.layers.is_adapted(mine):
            assert theirs.adapter == mine.adapter


# Their layers are in the config. A subclassed model, and a composite such as MultiHeadAttention,
# makes its inner layers anew when it is loaded.
IN_CONFIG = [name for name in MODELS if name not in ("subclassed", "text")]

# Keras's own, on the way to an error about weights that do not fit.
not_fitting = pytest.mark.filterwarnings("ignore:Skipping nested container")


@pytest.mark.parametrize("name", IN_CONFIG)
def test_keras_file_round_trip(name, tmp_path):
    model, inputs = adapted(name)
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_model(twin, model, inputs)


@not_fitting
@pytest.mark.parametrize("name", ["subclassed", "text"])
def test_layers_outside_the_config_fail_loudly_at_load(name, tmp_path):
    model, _ = adapted(name)
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="could not be loaded"):
        keras.saving.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("name", ["functional", "normalised"])
def test_a_loaded_model_trains_on_and_keeps_its_frozen_weights(name, tmp_path):
    model, inputs = adapted(name)
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    trained = {id(v) for v in twin.trainable_variables}
    still = [v for v in twin.weights if id(v) not in trained and "seed" not in v.path]
    before_still, before = snapshot(still), snapshot(all_factors(twin))
    compile_model(twin, klp.LoRAPlusAdamW(1e-2, lr_ratio=4.0))
    losses = fit(twin, inputs, epochs=5).history["loss"]
    assert losses[-1] < losses[0]
    for variable, value in zip(still, before_still, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value, err_msg=variable.path)
    for variable, value in zip(all_factors(twin), before, strict=True):
        assert not np.array_equal(to_numpy(variable), value), variable.path


@pytest.mark.parametrize("name", MODELS)
def test_weights_file_round_trip(name, tmp_path):
    model, inputs = adapted(name)
    model.save_weights(tmp_path / "model.weights.h5")
    twin, _ = adapted(name)
    for variable in all_factors(twin):
        variable.assign(np.zeros(variable.shape))
    twin.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(to_numpy(twin(inputs)), to_numpy(model(inputs)))


@pytest.mark.parametrize("name", IN_CONFIG)
def test_clone_model(name):
    model, inputs = adapted(name)
    twin = keras.models.clone_model(model)
    assert names(twin.trainable_variables) == names(model.trainable_variables)
    twin.set_weights(model.get_weights())
    np.testing.assert_array_equal(to_numpy(twin(inputs)), to_numpy(model(inputs)))


@pytest.mark.parametrize("name", IN_CONFIG)
def test_deepcopy(name):
    model, inputs = adapted(name)
    before = to_numpy(model(inputs))
    twin = copy.deepcopy(model)
    np.testing.assert_array_equal(to_numpy(twin(inputs)), before)
    randomize_factors(twin, seed=99)
    assert not np.array_equal(to_numpy(twin(inputs)), before)
    np.testing.assert_array_equal(to_numpy(model(inputs)), before)
    klp.merge_lora_plus(twin)
    np.testing.assert_array_equal(to_numpy(model(inputs)), before)


@keras.saving.register_keras_serializable("tests")
class Scaled(keras.layers.Dense):
    """A registered user layer with an argument and a call of its own."""

    def __init__(self, units, factor=2.0, **kwargs):
        super().__init__(units, **kwargs)
        self.factor = factor

    def call(self, inputs):
        return keras.ops.multiply(super().call(inputs), self.factor)

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


class Unregistered(keras.layers.Dense):
    """A user layer that is found by its module alone, or in custom objects."""


@pytest.mark.parametrize("layer_class", [Scaled, Unregistered])
def test_a_users_subclass_round_trips(layer_class, tmp_path):
    extra = {"factor": 3.0} if layer_class is Scaled else {}
    inputs = keras.Input((6,))
    hidden = layer_class(8, name="user", **extra)(inputs)
    model = filled(keras.Model(inputs, keras.layers.Dense(3, name="head")(hidden)))
    klp.enable_lora_plus(model, rank=2, alpha=5)
    randomize_factors(model)
    model.save(tmp_path / "model.keras")
    with keras.saving.custom_object_scope({layer_class.__name__: layer_class}):
        twin = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_model(twin, model, features())
    assert isinstance(twin.get_layer("user"), layer_class)
    klp.merge_lora_plus(twin)
    assert type(twin.get_layer("user")) is layer_class


def test_standalone_layers_in_a_model_round_trip(tmp_path):
    inputs = keras.Input((6,))
    x = klp.layers.LoRAPlusDense(8, rank=2, alpha=5, activation="tanh", name="lora")(inputs)
    model = filled(keras.Model(inputs, keras.layers.Dense(3, name="head")(x)))
    randomize_factors(model)
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_model(twin, model, features())
    assert type(twin.get_layer("lora")) is klp.layers.LoRAPlusDense


def test_alpha_counts_after_loading(tmp_path):
    """K04: the delta is scaled by alpha / rank before and after."""
    model = functional()
    before = to_numpy(model.get_layer("first").kernel).copy()
    klp.enable_lora_plus(model, rank=2, alpha=8, targets=["first"])
    randomize_factors(model)
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    a, b = (to_numpy(v).astype("float64") for v in all_factors(twin))
    klp.merge_lora_plus(twin)
    np.testing.assert_allclose(
        to_numpy(twin.get_layer("first").kernel), before + 4 * a @ b, rtol=1e-5, atol=1e-6
    )


@not_fitting
def test_a_file_of_another_scale_is_refused(tmp_path):
    model = functional()
    klp.enable_lora_plus(model, rank=2, alpha=8)
    model.save_weights(tmp_path / "model.weights.h5")
    twin = functional()
    klp.enable_lora_plus(twin, rank=2, alpha=4)
    with pytest.raises(ValueError, match="alpha"):
        twin.load_weights(tmp_path / "model.weights.h5")
