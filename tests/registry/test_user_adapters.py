"""A layer that holds its own matrices, with an adapter that a user registers."""

import keras
import numpy as np
import pytest
from autodiff import finite_differences, gradients
from factored import formed
from lora_cases import all_factors, as_float64, factors, randomize, randomize_factors, snapshot
from registry_layers import (
    EXPERTS,
    HIDDEN,
    INPUTS,
    OUTPUTS,
    Bank,
    BankAdapter,
    Gated,
    GatedAdapter,
    bank_formula,
    data,
    gated_formula,
    model_with,
)
from tolerances import FLOAT32_LAYER, FLOAT32_MODEL, assert_close, relative_error

import keras_loraplus as klp

CASES = {
    "gated": (Gated, GatedAdapter, {"width": HIDDEN}, gated_formula),
    "bank": (Bank, BankAdapter, {"alpha": 1.5}, bank_formula),
}
each = pytest.mark.parametrize("name", list(CASES))


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def enabled(name, **settings):
    """Returns a model with the layer `own` adapted, and the numpy formula of that layer."""
    layer_class, adapter, arguments, formula = CASES[name]
    klp.register_adapter(layer_class, adapter)
    model = model_with(layer_class(name="own", **arguments))
    klp.enable_lora_plus(model, rank=2, alpha=3, **settings)
    return model, formula


def test_the_report_gives_the_factors_of_each_matrix():
    klp.register_adapter(Gated, GatedAdapter)
    klp.register_adapter(Bank, BankAdapter)
    inputs = keras.Input((INPUTS,))
    outputs = keras.layers.add([Gated()(inputs), Bank()(inputs)])
    model = keras.Model(inputs, keras.layers.Dense(2)(outputs))
    report = klp.enable_lora_plus(model, rank=2)
    gated, bank = (layer.shapes for layer in report.adapted)
    assert gated == {
        "lora_kernel_gate_a": (INPUTS, 2),
        "lora_kernel_gate_b": (2, HIDDEN),
        "lora_kernel_up_a": (INPUTS, 2),
        "lora_kernel_up_b": (2, HIDDEN),
        "lora_kernel_down_a": (HIDDEN, 2),
        "lora_kernel_down_b": (2, OUTPUTS),
    }
    assert bank == {
        "lora_kernel_kernels_a": (EXPERTS, INPUTS, 2),
        "lora_kernel_kernels_b": (EXPERTS, 2, OUTPUTS),
    }
    assert "5 x 2" in str(report) and "2 x 2 x 3" in str(report)


@each
@pytest.mark.parametrize("init", ["loraplus", "lora"])
def test_outputs_are_unchanged_and_then_those_of_the_formula(name, init):
    layer_class, adapter, arguments, formula = CASES[name]
    klp.register_adapter(layer_class, adapter)
    model = model_with(layer_class(name="own", **arguments))
    layer, x = model.get_layer("own"), data()
    before = to_numpy(layer(x))
    klp.enable_lora_plus(model, rank=2, alpha=3, init=init)
    np.testing.assert_array_equal(to_numpy(layer(x)), before)
    zero = [not np.any(to_numpy(v)) for v in factors(layer)]
    assert zero == [init == "loraplus", init == "lora"] * (len(zero) // 2)
    randomize(factors(layer))
    actual = to_numpy(layer(x))
    assert relative_error(actual, before) > 1e-2
    assert_close(actual, formula(layer, x.astype("float64")), FLOAT32_LAYER)


@each
def test_gradients_are_those_of_the_formula(name):
    model, formula = enabled(name)
    layer, x = model.get_layer("own"), data()
    randomize(factors(layer))
    weights = np.random.default_rng(2).normal(size=(len(x), OUTPUTS))

    def loss():
        return keras.ops.sum(layer(x) * keras.ops.cast(weights, "float32"))

    def oracle_of(variable):
        class Shifted:
            """The layer with one variable's value replaced."""

            def __init__(self, value):
                self.value = value

            def __getattr__(self, attribute):
                found = getattr(layer, attribute)
                return self.value if found is variable else found

        return lambda value: np.sum(formula(Shifted(value), x.astype("float64")) * weights)

    for variable, actual in zip(factors(layer), gradients(loss, factors(layer)), strict=True):
        expected = finite_differences(oracle_of(variable), as_float64(variable))
        assert np.max(np.abs(expected)) > 1e-2
        assert_close(actual, expected, FLOAT32_LAYER)


@each
def test_training_moves_every_factor_and_nothing_else(name):
    model, _ = enabled(name, dropout=0.1)
    layer = model.get_layer("own")
    trained = {v.path for v in model.trainable_variables}
    assert {v.path for v in factors(layer)} < trained
    assert len(trained) == len(factors(layer)) + 2  # and the head
    frozen = [v for v in layer.weights if v.name in ("gate", "up", "down", "offset", "kernels")]
    values, moving = snapshot(frozen), snapshot(factors(layer))
    model.compile(klp.LoRAPlusAdamW(1e-2, lr_ratio=4.0), loss="mse")
    roles = {row.path.rpartition("/")[2]: row.multiplier for row in klp.assignments(model)}
    for variable in factors(layer):
        assert roles[variable.name] == (4.0 if variable.name.endswith("_b") else 1.0)
    model.fit(data(), np.ones((6, 2)), epochs=3, verbose=0)
    for variable, value in zip(frozen, values, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)
    for variable, value in zip(factors(layer), moving, strict=True):
        assert not np.array_equal(to_numpy(variable), value), variable.path
    model.trainable = False
    model.trainable = True
    assert {v.path for v in layer.trainable_variables} == {v.path for v in factors(layer)}


@each
def test_merged_is_the_plain_class_with_the_same_outputs(name):
    model, _ = enabled(name)
    layer, plain_class = model.get_layer("own"), CASES[name][0]
    assert type(layer).__name__ == plain_class.__name__ and type(layer) is not plain_class
    before = model.predict(data(), verbose=0)
    randomize_factors(model)
    adapted = model.predict(data(), verbose=0)
    assert relative_error(adapted, before) > 1e-2
    klp.merge_lora_plus(model)
    assert type(layer) is plain_class
    assert_close(to_numpy(model(data())), adapted, FLOAT32_MODEL)
    assert not any("lora" in v.name for v in layer.weights)
    assert len(layer.trainable_variables) == len(layer.weights)


@each
def test_files(name, tmp_path):
    """An adapter, a whole model, weights from before it was adapted and from after."""
    layer_class, adapter, arguments, _ = CASES[name]
    plain = model_with(layer_class(name="own", **arguments))
    plain.save_weights(tmp_path / "base.weights.h5")
    base = to_numpy(plain(data()))

    model, _ = enabled(name)
    randomize(model.weights, seed=8)
    model.load_weights(tmp_path / "base.weights.h5")
    with klp.adapters_disabled(model):
        np.testing.assert_array_equal(to_numpy(model(data())), base)
    randomize_factors(model)
    adapted = to_numpy(model(data()))
    assert relative_error(adapted, base) > 1e-2

    klp.save_adapter(model, tmp_path / "a.safetensors")
    klp.load_adapter(plain, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(to_numpy(plain(data())), adapted)

    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(twin(data())), adapted)
    for argument, value in arguments.items():
        assert getattr(twin.get_layer("own"), argument) == value
    assert twin.get_layer("own").adapter == model.get_layer("own").adapter
    trained = [v.path for v in twin.get_layer("own").trainable_variables]
    assert trained == [v.path for v in factors(twin.get_layer("own"))]

    model.save_weights(tmp_path / "adapted.weights.h5")
    randomize(twin.weights, seed=9)
    twin.load_weights(tmp_path / "adapted.weights.h5")
    np.testing.assert_array_equal(to_numpy(twin(data())), adapted)
    klp.merge_lora_plus(twin)
    twin.save_weights(tmp_path / "merged.weights.h5")
    plain = model_with(layer_class(name="own", **arguments))
    plain.load_weights(tmp_path / "merged.weights.h5")
    assert_close(to_numpy(plain(data())), adapted, FLOAT32_MODEL)


def test_named_adapters_of_other_ranks():
    model, _ = enabled("bank", max_rank=4)
    randomize_factors(model)
    first = to_numpy(model(data()))
    klp.add_adapter(model, "other", rank=3)
    klp.set_adapter(model, "other")
    assert relative_error(to_numpy(model(data())), first) > 1e-2
    klp.set_adapter(model, "default")
    np.testing.assert_array_equal(to_numpy(model(data())), first)


@each
def test_nothing_of_a_matrix_s_size_is_formed(name):
    model, _ = enabled(name)
    layer = model.get_layer("own")
    x = keras.ops.convert_to_tensor(data(11))
    layer(x)
    randomize(factors(layer))
    loss = lambda: keras.ops.sum(keras.ops.square(layer(x)))  # noqa: E731
    names = layer.matrix_attributes()
    for size in {int(np.prod(getattr(layer, attribute).shape)) for attribute in names}:
        assert formed(loss, factors(layer), size) == []
    assert formed(loss, factors(layer), int(np.prod(factors(layer)[0].shape)))


def test_dropout_acts_in_training_alone():
    model, _ = enabled("bank", dropout=0.5)
    randomize_factors(model)
    layer = model.get_layer("own")
    inference = to_numpy(layer(data(), training=False))
    np.testing.assert_array_equal(to_numpy(layer(data())), inference)
    assert relative_error(to_numpy(layer(data(), training=True)), inference) > 1e-2


def test_low_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model, _ = enabled("gated")
    assert {v.dtype for v in all_factors(model)} == {"float32"}
    layer = model.get_layer("own")
    assert keras.backend.standardize_dtype(layer(data()).dtype) == "bfloat16"


def test_a_subclass_that_calls_the_plain_call():
    class Doubled(Gated):
        def call(self, inputs):
            return 2 * super().call(inputs)

    klp.register_adapter(Gated, GatedAdapter)
    model = model_with(Doubled(name="own"))
    before = to_numpy(model(data()))
    klp.enable_lora_plus(model, rank=2)
    np.testing.assert_array_equal(to_numpy(model(data())), before)
    randomize_factors(model)
    expected = 2 * gated_formula(model.get_layer("own"), data().astype("float64"))
    assert_close(to_numpy(model.get_layer("own")(data())), expected, FLOAT32_LAYER)


def test_a_subclass_that_reads_a_matrix_itself_is_refused():
    class Peeking(Gated):
        def call(self, inputs):
            return super().call(inputs) + keras.ops.sum(self.gate)

    klp.register_adapter(Gated, GatedAdapter)
    model = model_with(Peeking(name="own"))
    with pytest.raises(ValueError, match="reads the kernel itself"):
        klp.enable_lora_plus(model, rank=2)
    assert type(model.get_layer("own")) is Peeking


def test_the_monitor_measures_its_updates():
    model, _ = enabled("bank")
    randomize_factors(model)
    layer = model.get_layer("own")
    model.compile(klp.LoRAPlusAdamW(0.0, weight_decay=0.0), loss="mse")
    monitor = klp.callbacks.LoRAPlusMonitor(probe=data(), every=1)
    model.fit(data(), np.ones((6, 2)), verbose=0, callbacks=[monitor])
    a, b = map(as_float64, factors(layer))
    delta = layer.adapter.scale * np.einsum("eir,ero->eio", a, b)
    expected = np.linalg.norm(delta) / np.linalg.norm(as_float64(layer.kernels))
    found = monitor.records[0]["layers"]["own/kernels"]
    assert found["update"] == pytest.approx(expected, rel=1e-5)
    assert "inside of it alone" in monitor.left_out["own/kernels"]
