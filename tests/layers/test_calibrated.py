"""Adapters beside GPTQ and AWQ matrices, which are stored once they have been calibrated."""

import keras
import numpy as np
import pytest
from autodiff import finite_differences, gradients
from keras.src.quantizers import awq, gptq
from lora_cases import CASES, as_float64, factors, randomize, snapshot
from quantized_cases import quick_deletes, unpacked
from tolerances import FLOAT32_LAYER, assert_close, relative_error

import keras_loraplus as klp

DENSE, QUERY = (next(c for c in CASES if c.name == name) for name in ("dense", "einsum-query"))


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_deletes():
        yield


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


# 3.16's nightly builds calibrate with other classes, and store matrices as they multiply.
NIGHTLY = hasattr(gptq, "GPTQCalibrator")


def config_of(mode, bits=4):
    if mode == "awq":
        return keras.quantizers.AWQConfig(dataset=["-"], tokenizer=len, group_size=2)
    return keras.quantizers.GPTQConfig(dataset=["-"], tokenizer=len, weight_bits=bits, group_size=2)


def calibrated(case, mode, bits=4):
    """Quantizes one layer as Keras does those of a model, on random inputs."""
    layer, config = case.make_plain(), config_of(mode, bits)
    layer.quantize(config=config)
    samples = keras.ops.reshape(case.inputs(seed=4), (-1, case.shape[-1]))
    if NIGHTLY:
        worker = {"gptq": gptq, "awq": awq}[mode]
        worker = getattr(worker, f"{mode.upper()}Calibrator")(layer, config)
        worker.observe(samples)
        worker.quantize()
        return layer
    if mode == "gptq":
        worker = gptq.GPTQ(layer, config)
        worker.update_hessian_with_batch(samples)
        worker.quantize_and_correct_layer()
    else:
        worker = awq.AWQ(layer, config)
        worker.update_activation_magnitudes(samples)
        worker.quantize_layer()
    worker.free()
    return layer


def kernel_of(layer, bits):
    """Dequantizes by numpy: outputs are rows, groups of two inputs have a scale."""
    names = ("quantized_kernel", "kernel_scale", "kernel_zero")
    packed, scale, zero = (np.asarray(to_numpy(getattr(layer, name))) for name in names)
    if NIGHTLY:
        packed, scale, zero = packed.T, scale.T, zero.T
    scale, zero = scale.astype("float64"), zero.astype("float64")
    values = unpacked(packed.view("int8"), scale.shape[0], 0) & 15 if bits == 4 else packed
    groups = as_float64(layer.g_idx).astype("int64")
    kernel = ((values - zero[:, groups]) * scale[:, groups]).T
    if layer.quantization_mode == "awq":
        kernel = kernel / as_float64(layer.awq_scales)[:, None]
    return kernel.reshape(layer._matrix_shape("_kernel"))


@pytest.mark.parametrize(
    "case, mode, bits",
    [(DENSE, "gptq", 4), (QUERY, "gptq", 8), (DENSE, "awq", 4), (QUERY, "awq", 4)],
    ids=["dense-gptq", "query-gptq-8", "dense-awq", "query-awq"],
)
def test_an_adapted_calibrated_layer_computes_the_formula(case, mode, bits):
    layer = calibrated(case, mode, bits)
    before = to_numpy(case.call(layer))
    stored = snapshot(layer.weights)
    variables = list(layer.weights)
    case.lora.from_layer(layer, rank=3, alpha=5.0)
    np.testing.assert_array_equal(to_numpy(case.call(layer)), before)
    randomize(factors(layer))

    def expected(**overrides):
        values = {v.name: as_float64(v) for v in factors(layer)}
        values["kernel"] = kernel_of(layer, bits)
        return case.expected(layer, None, {**values, **overrides})

    actual = to_numpy(case.call(layer))
    assert_close(actual, expected(), FLOAT32_LAYER)
    assert relative_error(actual, before) > 5e-2
    weights = np.random.default_rng(2).normal(size=actual.shape)
    found = gradients(
        lambda: keras.ops.sum(case.call(layer) * keras.ops.cast(weights, "float32")),
        factors(layer),
    )
    for variable, gradient in zip(factors(layer), found, strict=True):
        right = finite_differences(
            lambda value, name=variable.name: np.sum(expected(**{name: value}) * weights),
            as_float64(variable),
        )
        assert_close(gradient, right, FLOAT32_LAYER)
    for variable, value in zip(variables, stored, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)
    assert {v.name for v in layer.trainable_variables} == {"bias", *layer.adapter_variables()}
    # Quantizing again needs the data; a float layer does not.
    with pytest.raises(ValueError, match=f"{mode} needs the data.*dequantize=True"):
        klp.merge_lora_plus(layer)
    assert klp.layers.is_adapted(layer)
    klp.merge_lora_plus(layer, dequantize=True)
    assert type(layer) is case.plain and layer.quantization_mode is None
    assert_close(to_numpy(case.call(layer)), actual, FLOAT32_LAYER)


@pytest.mark.parametrize("mode", ["gptq", "awq"])
def test_what_is_not_calibrated_is_not_adapted(mode):
    layer = DENSE.make_plain()
    layer.quantize(config=config_of(mode))
    assert (
        klp.layers.why_not_adoptable(layer) == f"it is quantized to {mode} and not calibrated yet"
    )
    other = DENSE.make_plain()
    klp.layers.LoRAPlusDense.from_layer(other, rank=2)
    with pytest.raises(ValueError, match="quantize first, then enable"):
        other.quantize(config=config_of(mode))
    assert other.quantization_mode is None
