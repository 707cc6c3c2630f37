"""User layers and wrappers whose signatures and arguments are their own."""

import keras
import numpy as np
import pytest
from lora_cases import randomize_factors, snapshot
from tiny_models import features, filled, functional
from tolerances import FLOAT32_MODEL, assert_close, relative_error

import keras_loraplus as klp


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


@keras.saving.register_keras_serializable("tests")
class SameNames(keras.layers.Dense):
    """Has arguments that are called like an adapter's settings."""

    def __init__(self, units, dropout=0.3, rank=5, alpha=6, init="ones", scaling="x", **kwargs):
        super().__init__(units, **kwargs)
        self.arguments = {
            "dropout": dropout,
            "rank": rank,
            "alpha": alpha,
            "init": init,
            "scaling": scaling,
        }

    def get_config(self):
        return {**super().get_config(), **self.arguments}


def with_layer(layer, inputs=None, *args, **kwargs):
    inputs = keras.Input((6,)) if inputs is None else inputs
    x = layer(inputs, *args, **kwargs)
    return filled(keras.Model([inputs, *args], keras.layers.Dense(3, name="head")(x)))


@pytest.mark.parametrize("how", ["clone", "file"])
def test_arguments_of_the_same_names_survive(how, tmp_path):
    arguments = {"dropout": 0.7, "rank": 9, "alpha": 2, "init": "zeros", "scaling": "y"}
    model = with_layer(SameNames(8, name="user", **arguments))
    klp.enable_lora_plus(model, rank=2, alpha=3)
    if how == "clone":
        twin = keras.models.clone_model(model)
    else:
        model.save(tmp_path / "model.keras")
        twin = keras.saving.load_model(tmp_path / "model.keras")
    layer = twin.get_layer("user")
    assert layer.arguments == arguments
    assert (layer.adapter.rank, layer.adapter.alpha) == (2, 3)


class Gated(keras.layers.Dense):
    """Two inputs."""

    def build(self, inputs_shape, gate_shape):
        super().build(inputs_shape)

    def call(self, inputs, gate):
        return super().call(inputs) * gate


class NeedsTraining(keras.layers.Dense):
    """`training` without a default."""

    def call(self, inputs, training):
        return super().call(inputs, training)


class AnyKeywords(keras.layers.Dense):
    def call(self, inputs, **kwargs):
        return super().call(inputs)


def test_a_call_of_two_inputs():
    model = with_layer(Gated(8, name="user"), None, keras.Input((8,)))
    x = [features(), np.random.default_rng(1).normal(size=(12, 8)).astype("float32")]
    before = to_numpy(model(x))
    report = klp.enable_lora_plus(model, rank=2)
    assert [layer.path for layer in report.adapted] == ["user"]
    np.testing.assert_array_equal(to_numpy(model(x)), before)
    randomize_factors(model)
    adapted = to_numpy(model(x))
    assert relative_error(adapted, before) > 1e-2
    klp.merge_lora_plus(model)
    assert_close(to_numpy(model(x)), adapted, FLOAT32_MODEL)


@pytest.mark.parametrize(
    "layer_class, kwargs", [(NeedsTraining, {"training": False}), (AnyKeywords, {})]
)
def test_other_signatures_with_dropout(layer_class, kwargs):
    layer = layer_class(8, name="user")
    model = with_layer(layer, None, **kwargs)
    klp.enable_lora_plus(model, rank=2, dropout=0.5)
    randomize_factors(model)
    inference = to_numpy(layer(features(), training=False))
    assert relative_error(to_numpy(layer(features(), training=True)), inference) > 1e-2


def test_time_distributed(tmp_path):
    inputs = keras.Input((5, 6))
    x = keras.layers.TimeDistributed(keras.layers.Dense(8, name="inner"), name="steps")(inputs)
    model = filled(keras.Model(inputs, keras.layers.Dense(3, name="head")(x)))
    klp.enable_lora_plus(model, rank=2, dropout=0.5)
    randomize_factors(model)
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype("float32")
    adapted = to_numpy(model(x))
    assert relative_error(to_numpy(model(x, training=True)), adapted) > 1e-2
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(to_numpy(twin(x)), adapted, FLOAT32_MODEL)
    klp.merge_lora_plus(model)
    assert_close(to_numpy(model(x)), adapted, FLOAT32_MODEL)


@pytest.mark.parametrize("whole", [True, False])
def test_what_the_user_froze_stays_frozen_and_adapters_train(whole):
    model = functional()
    (model if whole else model.get_layer("head")).trainable = False
    report = klp.enable_lora_plus(model, rank=2)
    assert {v.name for v in model.trainable_variables} == {"lora_kernel_a", "lora_kernel_b"}
    assert len(model.trainable_variables) == 4
    assert "left unadapted, frozen as it was: head" in str(report)
    klp.merge_lora_plus(model)
    assert model.trainable is not whole
    assert not model.get_layer("head").trainable
    assert len(model.trainable_variables) == (0 if whole else 4)


def test_merging_disabled_adapters_is_refused():
    """It would change the outputs, and old traces would see the delta twice afterwards."""
    model = functional()
    base = to_numpy(model(features()))
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    adapted = to_numpy(model(features()))
    values = snapshot(model.weights)
    with klp.adapters_disabled(model):
        np.testing.assert_array_equal(to_numpy(model(features())), base)
        with pytest.raises(ValueError, match="disabled"):
            klp.merge_lora_plus(model)
    for variable, value in zip(model.weights, values, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)
    klp.merge_lora_plus(model)
    assert_close(to_numpy(model(features())), adapted, FLOAT32_MODEL)


def test_merging_a_part_leaves_the_rest():
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    adapted = to_numpy(model(features()))
    klp.merge_lora_plus(model.get_layer("first"))
    assert not klp.layers.is_adapted(model.get_layer("first"))
    assert klp.layers.is_adapted(model.get_layer("second"))
    assert_close(to_numpy(model(features())), adapted, FLOAT32_MODEL)
    klp.merge_lora_plus(model)
    assert_close(to_numpy(model(features())), adapted, FLOAT32_MODEL)
    assert len(model.trainable_variables) == 6


def test_initial_tables_of_a_standalone_embedding():
    table = np.random.default_rng(0).normal(size=(9, 4)).astype("float32")
    layer = klp.layers.LoRAPlusEmbedding(9, 4, rank=2, weights=[table])
    np.testing.assert_array_equal(to_numpy(layer(np.arange(9))), table)
    layer = klp.layers.LoRAPlusReversibleEmbedding(
        9, 4, rank=2, tie_weights=False, weights=[table, table.T]
    )
    np.testing.assert_array_equal(to_numpy(layer.reverse_embeddings), table.T)


def test_torch_sees_the_factors_in_its_own_views(backend):
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    if backend != "torch":
        # The other backends have Keras's lists alone.
        assert len([v for v in model.variables if "lora_kernel" in v.path]) == 4
        return
    assert len([name for name in model.state_dict() if "lora_kernel" in name]) == 4
    klp.merge_lora_plus(model)
    assert not [name for name in model.state_dict() if "lora" in name]
