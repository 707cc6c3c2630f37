"""Adapters beside int8 and int4 matrices: formula, gradients, freezing, both orders."""

import keras
import numpy as np
import pytest
from autodiff import finite_differences, gradients
from lora_cases import as_float64, factors, ids, randomize, snapshot
from quantized_cases import (
    GRADIENT_PAIRS,
    PAIRS,
    SOME,
    expected,
    pair_ids,
    quantize,
    quick_deletes,
)
from tolerances import FLOAT32_LAYER, INT8, assert_close, relative_error

# Keras 3.15.1 transposes the scales of a tied table, which have one axis; so does the plain layer.
pytestmark = pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_deletes():
        yield


each_pair = pytest.mark.parametrize("case, mode", PAIRS, ids=pair_ids(PAIRS))
some_cases = pytest.mark.parametrize("case", SOME, ids=ids(SOME))


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def adapted_after(case, mode, **kwargs):
    layer = case.make_plain(**kwargs)
    tolerance = quantize(layer, mode)
    case.lora.from_layer(layer, rank=3, alpha=5.0)
    return layer, tolerance


@each_pair
def test_an_adapted_quantized_layer_computes_the_formula(case, mode):
    plain = case.make_plain()
    tolerance = quantize(plain, mode)
    before = to_numpy(case.call(plain))
    stored = snapshot(plain.weights)
    variables = list(plain.weights)
    layer = case.lora.from_layer(plain, rank=3, alpha=5.0)
    np.testing.assert_array_equal(to_numpy(case.call(layer)), before)
    randomize(factors(layer))
    actual = to_numpy(case.call(layer))
    assert_close(actual, expected(case, layer), tolerance)
    assert relative_error(actual, before) > 5e-2
    merged = {name.lstrip("_"): as_float64(v) for name, v in layer.merged_values().items()}
    nothing = {v.name: np.zeros(v.shape) for v in factors(layer)}
    through_merged = case.expected(layer, overrides={**nothing, **merged})
    assert_close(through_merged, expected(case, layer), FLOAT32_LAYER)
    # `call` and `quantized_call` are two doors into one room.
    direct = {"reverse": True} if case.reverse else {}
    inputs = keras.ops.convert_to_tensor(case.inputs())
    np.testing.assert_array_equal(to_numpy(layer.quantized_call(inputs, **direct)), actual)
    # K11: what is stored is what was stored, and only A and B (and a bias) train.
    for variable, value in zip(variables, stored, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)
    assert {v.name for v in layer.trainable_variables} <= {"bias", *layer.adapter_variables()}
    layer.trainable = False
    layer.trainable = True
    assert {v.name for v in layer.trainable_variables} <= {"bias", *layer.adapter_variables()}
    assert {v.dtype for v in factors(layer)} == {"float32"}


@pytest.mark.parametrize("mode", ["int4-blocks"])
@some_cases
def test_quantizing_an_adapted_layer_is_adapting_a_quantized_one(case, mode):
    first, second = case.make_plain(), case.make_plain()
    quantize(first, mode)
    case.lora.from_layer(first, rank=3, alpha=5.0)
    case.lora.from_layer(second, rank=3, alpha=5.0)
    randomize(factors(second))
    unquantized = to_numpy(case.call(second))
    kept = factors(second)
    quantize(second, mode)
    assert [id(v) for v in factors(second)] == [id(v) for v in kept]
    for variable, other in zip(factors(first), kept, strict=True):
        variable.assign(other)
    actual = to_numpy(case.call(second))
    np.testing.assert_array_equal(actual, to_numpy(case.call(first)))
    # Quantizing did change the outputs, the adapter's part of which stayed.
    assert 0 < relative_error(actual, unquantized) < 0.5
    assert {v.name for v in second.trainable_variables} == {
        v.name for v in first.trainable_variables
    }
    assert sorted(v.name for v in second.weights) == sorted(v.name for v in first.weights)


@pytest.mark.parametrize("case, mode", GRADIENT_PAIRS, ids=pair_ids(GRADIENT_PAIRS))
def test_gradients_of_factors_and_inputs(case, mode):
    layer, tolerance = adapted_after(case, mode)
    randomize(factors(layer))
    used = [v for v in factors(layer) if not _is_other_direction(case, v)]
    weights = np.random.default_rng(2).normal(size=expected(case, layer).shape)
    inputs = case.inputs()
    source = None
    if not case.takes_tokens:
        source = keras.Variable(inputs, name="source")

    def loss():
        fed = inputs if source is None else keras.ops.multiply(source, 1.0)
        return keras.ops.sum(case.call(layer, fed) * keras.ops.cast(weights, "float32"))

    watched = used if source is None else [*used, source]
    for variable, actual in zip(watched, gradients(loss, watched), strict=True):

        def oracle(value, name=variable.name):
            if name == "source":
                return np.sum(expected(case, layer, value) * weights)
            return np.sum(expected(case, layer, inputs, {name: value}) * weights)

        right = finite_differences(oracle, as_float64(variable))
        assert np.max(np.abs(right)) > 1e-2
        # Rounded inputs move the slope of the activation: a little less exact than the output.
        assert_close(actual, right, 2 * tolerance)


def _is_other_direction(case, variable):
    if case.arguments.get("tie_weights", True):
        return False
    return variable.name.startswith("lora_embeddings" if case.reverse else "lora_kernel")


@pytest.mark.parametrize("case", [case for case in SOME if not case.reverse], ids=lambda c: c.name)
def test_outputs_have_the_compute_dtype(case):
    """K06 beside a quantized matrix."""
    dtype, mode = "mixed_bfloat16", "int4-blocks" if case.takes_tokens else "int8"
    layer, _ = adapted_after(case, mode, dtype=dtype)
    randomize(factors(layer))
    inputs = keras.ops.convert_to_tensor(case.inputs())
    outputs = case.call(layer, inputs)
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    assert_close(to_numpy(keras.ops.cast(outputs, "float32")), expected(case, layer), 2 * INT8)
    assert {v.dtype for v in factors(layer)} == {"float32"}
