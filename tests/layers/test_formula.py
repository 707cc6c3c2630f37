"""Every layer's output and gradients against W + s A B in numpy float64."""

import keras
import numpy as np
import pytest
from autodiff import finite_differences, gradients
from lora_cases import (
    CASES,
    CHANNELS_FIRST_CASES,
    ONE_OF_EACH,
    SCALES,
    Case,
    as_float64,
    factors,
    ids,
    randomize,
)
from tolerances import FLOAT32_LAYER, assert_close, relative_error

ALL = CASES + CHANNELS_FIRST_CASES


def runnable(case: Case):
    """TensorFlow has no channels-first convolution on the CPU; the other backends run it."""
    if case in CHANNELS_FIRST_CASES and keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow's CPU convolutions take channels-last inputs only")


def built(case, **kwargs):
    layer = case.make(**kwargs)
    case.call(layer)
    return layer


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids(ONE_OF_EACH))
def test_output_is_that_of_the_dense_formula(case, scaling):
    layer = built(case, scaling=scaling)
    assert layer.adapter.scale == pytest.approx(SCALES[scaling], rel=1e-12)
    at_start = to_numpy(case.call(layer))
    randomize(factors(layer))
    actual = to_numpy(case.call(layer))
    assert_close(actual, case.expected(layer), FLOAT32_LAYER)
    assert relative_error(actual, at_start) > 1e-2


@pytest.mark.parametrize("case", ALL, ids=ids(ALL))
def test_an_adopted_layer_computes_the_same(case):
    runnable(case)
    layer = case.make_plain()
    before = to_numpy(case.call(layer))
    assert case.lora.from_layer(layer, rank=3, alpha=5.0) is layer
    np.testing.assert_array_equal(to_numpy(case.call(layer)), before)
    randomize(factors(layer))
    assert_close(to_numpy(case.call(layer)), case.expected(layer), FLOAT32_LAYER)


@pytest.mark.parametrize("case", ALL, ids=ids(ALL))
def test_gradients_are_those_of_the_dense_formula(case):
    runnable(case)
    layer = built(case)
    randomize(factors(layer))
    weights = np.random.default_rng(2).normal(size=case.expected(layer).shape)

    def loss():
        return keras.ops.sum(case.call(layer) * keras.ops.cast(weights, "float32"))

    # Only the variables that this direction reads; untied tables have one adapter each.
    used = [v for v in factors(layer) if not _is_other_direction(case, v)]
    assert len(used) == 2
    for variable, actual in zip(used, gradients(loss, used), strict=True):

        def oracle(value, name=variable.name):
            return np.sum(case.expected(layer, overrides={name: value}) * weights)

        expected = finite_differences(oracle, as_float64(variable))
        assert np.max(np.abs(expected)) > 1e-2
        assert_close(actual, expected, FLOAT32_LAYER)


def _is_other_direction(case, variable):
    if case.arguments.get("tie_weights", True):
        return False
    return variable.name.startswith("lora_embeddings" if case.reverse else "lora_kernel")


@pytest.mark.parametrize("case", ALL, ids=ids(ALL))
def test_merged_values_are_those_of_the_formula(case):
    runnable(case)
    layer = built(case)
    randomize(factors(layer))
    zero = {v.name: np.zeros(v.shape) for v in factors(layer)}
    merged = {name.lstrip("_"): as_float64(v) for name, v in layer.merged_values().items()}
    expected = case.expected(layer, overrides={**zero, **merged})
    assert_close(expected, case.expected(layer), FLOAT32_LAYER)
