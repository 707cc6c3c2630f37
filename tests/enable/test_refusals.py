"""K21 and transactions: what cannot be enabled is refused by name, and nothing has changed."""

import keras
import numpy as np
import pytest
from lora_cases import randomize_factors, snapshot
from tiny_models import features, filled, functional, normalised
from tolerances import FLOAT32_LAYER, assert_close

import keras_loraplus as klp
from keras_loraplus import layers as kl


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def state(model):
    return [
        (
            type(la),
            la.trainable,
            sorted(vars(la)),
            [(v.path, v.trainable) for v in la.trainable_variables],
            [(v.path, v.trainable) for v in la.non_trainable_variables],
        )
        for la in model._flatten_layers()
    ]


def assert_refused(model, message, **arguments):
    before, values = state(model), snapshot(model.weights)
    with pytest.raises(ValueError, match=message):
        klp.enable_lora_plus(model, **{"rank": 2, **arguments})
    assert state(model) == before
    for variable, value in zip(model.weights, values, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)


def test_enabling_twice():
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    assert_refused(model, "already has LoRA\\+ adapters, on: \\['first', 'second'\\]")
    assert_refused(model, "already has LoRA", targets=["head"])


def test_native_lora():
    model = functional()
    model.get_layer("first").enable_lora(2)
    assert_refused(model, "Keras's own LoRA, on: \\['first'\\]")


def test_native_lora_on_an_adopted_layer():
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    before = state(model)
    with pytest.raises(ValueError, match="already has a LoRA\\+ adapter of rank 2"):
        model.get_layer("first").enable_lora(4)
    assert state(model) == before


def test_an_unbuilt_model():
    model = keras.Sequential([keras.layers.Dense(4, name="one"), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="not built"):
        klp.enable_lora_plus(model)
    assert [type(la) for la in model.layers] == [keras.layers.Dense] * 2
    model.build((None, 3))
    assert klp.enable_lora_plus(model, rank=2).adapted


@pytest.mark.parametrize("thing", [None, "model", keras.layers.Dense, [1]])
def test_what_is_no_model(thing):
    with pytest.raises(ValueError, match="expects a keras.Model"):
        klp.enable_lora_plus(thing)


def test_a_model_without_adaptable_layers():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.layers.BatchNormalization()(inputs))
    assert_refused(model, "can be adapted")


# Keras's own, for every layer of a functional model that has nothing to quantize.
keras_warns = pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize`")


@keras_warns
def test_quantizing_to_float8_after_adapting_is_refused():
    """`Model.quantize` reports a layer that refuses as a warning."""
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    expected = to_numpy(model(features()))
    before = state(model)
    with pytest.raises(NotImplementedError, match="float8: the scales"):
        model.get_layer("first").quantize("float8")
    assert state(model) == before
    # Nightly builds of Keras name the layers, and not their reasons.
    with pytest.warns(UserWarning, match="is not quantized to float8|skipped.*'first'"):
        model.quantize("float8")
    for name in ("first", "second"):
        assert kl.is_adapted(model.get_layer(name))
        assert model.get_layer(name).quantization_mode is None
    assert_close(to_numpy(model(features())), expected, 0.1)


@keras_warns
def test_quantizing_after_merging_works():
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    expected = to_numpy(model(features()))
    klp.merge_lora_plus(model)
    model.quantize("int8")
    assert model.get_layer("first").quantization_mode == "int8"
    assert_close(to_numpy(model(features())), expected, 0.05)


def test_float8_layers_are_not_adapted():
    model = functional()
    model.get_layer("first").quantize("float8")
    report = klp.enable_lora_plus(model, rank=2)
    assert [layer.path for layer in report.adapted] == ["second"]
    assert dict(report.skipped)["first"].startswith("it is quantized to float8, whose scales")


class Doubled(keras.layers.Dense):
    """Decomposable: its product comes from `super().call`."""

    calls = 0

    def call(self, inputs, training=None):
        Doubled.calls += 1
        return keras.ops.multiply(super().call(inputs, training=training), 2.0)


class Direct(keras.layers.Dense):
    """Not decomposable: computes with the kernel itself."""

    def call(self, inputs):
        return keras.ops.matmul(inputs, self.kernel)


class Both(keras.layers.Dense):
    """Not decomposable: reaches `super().call` and reads the kernel as well."""

    def call(self, inputs):
        return super().call(inputs) + keras.ops.sum(self.kernel)


class Masked(keras.layers.Dense):
    """Not decomposable: its kernel is another one."""

    @property
    def kernel(self):
        return keras.ops.multiply(super().kernel, 2.0)


class OwnBuild(keras.layers.Dense):
    """A call of Keras, a build and an attribute of its own."""

    def build(self, input_shape):
        super().build(input_shape)
        self.gain = self.add_weight(name="gain", shape=(self.units,), initializer="ones")


def with_layer(layer):
    inputs = keras.Input((6,))
    x = layer(inputs)
    x = keras.layers.Dense(8, name="plain")(x)
    return filled(keras.Model(inputs, keras.layers.Dense(3, name="head")(x)))


def test_a_users_call_still_runs_over_its_own_class():
    model = with_layer(Doubled(8, name="user"))
    layer = model.get_layer("user")
    before = to_numpy(model(features()))
    klp.enable_lora_plus(model, rank=2, alpha=6)
    assert isinstance(layer, Doubled) and isinstance(layer, kl.LoRAPlusDense)
    assert type(layer).__name__ == "Doubled"
    np.testing.assert_array_equal(to_numpy(model(features())), before)
    randomize_factors(model)
    Doubled.calls = 0
    actual = to_numpy(layer(features()))
    assert Doubled.calls == 1
    kernel, a, b, bias = (
        to_numpy(v).astype("float64")
        for v in (layer.kernel, layer.lora_kernel_a, layer.lora_kernel_b, layer.bias)
    )
    assert_close(actual, 2 * (features() @ (kernel + 3 * a @ b) + bias), FLOAT32_LAYER)
    klp.merge_lora_plus(model)
    assert type(layer) is Doubled
    assert_close(to_numpy(layer(features())), actual, FLOAT32_LAYER)


@pytest.mark.parametrize(
    "layer_class, reason",
    [(Direct, "it does not|reads the kernel"), (Both, "reads the kernel"), (Masked, "kernel")],
)
def test_a_call_that_cannot_be_decomposed_is_refused_by_name(layer_class, reason):
    model = with_layer(layer_class(8, name="user"))
    assert_refused(model, layer_class.__name__, targets=["user"])
    report = klp.enable_lora_plus(model, rank=2)
    assert [layer.path for layer in report.adapted] == ["plain"]
    skipped = dict(report.skipped)
    assert layer_class.__name__ in skipped["user"]
    with pytest.raises(ValueError, match=reason):
        klp.enable_lora_plus(with_layer(layer_class(8, name="user")), targets=["user"], rank=2)


def test_a_users_build_and_variables():
    model = with_layer(OwnBuild(8, name="user"))
    klp.enable_lora_plus(model, rank=2, trainable=["user/gain"])
    layer = model.get_layer("user")
    assert {v.name for v in layer.trainable_variables} == {
        "gain",
        "lora_kernel_a",
        "lora_kernel_b",
    }
    klp.merge_lora_plus(model)
    assert [v.name for v in layer.trainable_variables] == ["kernel", "bias", "gain"]


def test_a_kernel_constraint_is_refused():
    model = with_layer(keras.layers.Dense(8, kernel_constraint="non_neg", name="user"))
    assert_refused(model, "kernel_constraint", targets=["user"])


@pytest.mark.parametrize("method", ["add_weight", "_build_factors", "adapter_variables"])
@pytest.mark.parametrize("make", [functional, normalised])
def test_a_failure_in_the_middle_changes_nothing(make, method, monkeypatch):
    model = make()
    inputs = np.random.default_rng(0).normal(size=(3, *model.input_shape[1:])).astype("float32")
    outputs, before = to_numpy(model(inputs)), state(model)
    values = snapshot(model.weights)
    adaptable = [la for la in model.layers if kl.lora_class_for(type(la))]
    owner = kl.lora_class_for(type(adaptable[1]))
    original, calls = getattr(owner, method), []

    def failing(self, *args, **kwargs):
        calls.append(self)
        # The first layer is adopted and the second begun.
        if self is adaptable[1]:
            raise RuntimeError("injected")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, failing)
    with pytest.raises(RuntimeError, match="injected"):
        klp.enable_lora_plus(model, rank=2)
    monkeypatch.undo()
    assert adaptable[1] in calls
    assert state(model) == before
    for variable, value in zip(model.weights, values, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)
    np.testing.assert_array_equal(to_numpy(model(inputs)), outputs)
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    assert not np.array_equal(to_numpy(model(inputs)), outputs)


def test_merging_what_has_no_adapters():
    with pytest.raises(ValueError, match="has no LoRA\\+ adapters to merge"):
        klp.merge_lora_plus(functional())
