"""Layers of `lora_cases` in Keras's quantized modes, and what they hold, unpacked by numpy."""

import contextlib
import gc

import keras
import numpy as np
from lora_cases import CASES, as_float64
from tolerances import FLOAT32_LAYER, INT8

from keras_loraplus.layers.einsum_split import kernel_axes, split_einsum

INT8_CONFIG = keras.quantizers.Int8QuantizationConfig
INT4_CONFIG = keras.quantizers.Int4QuantizationConfig

# Name: (config, how close a layer comes to the formula with its dequantized kernel). The first
# rounds its inputs to int8 too.
MODES = {
    "int8": (INT8_CONFIG, INT8),
    "int8-weights": (lambda: INT8_CONFIG(activation_quantizer=None), FLOAT32_LAYER),
    "int4-channel": (lambda: INT4_CONFIG(block_size=-1), FLOAT32_LAYER),
    "int4-blocks": (lambda: INT4_CONFIG(block_size=4), FLOAT32_LAYER),
}

# Keras 3.15.1 quantizes no einsum whose equation has an ellipsis (a TypeError), and no convolution.
QUANTIZABLE = [
    case
    for case in CASES
    if not case.name.startswith("conv") and case.name not in ("einsum-left", "einsum-right")
]


# One of each way to store and to compute, for tests whose subject is neither.
SOME = [
    case
    for case in QUANTIZABLE
    if case.name in {"dense", "einsum-query", "embedding", "reversible-untied-reverse"}
]

_BY_NAME = {case.name: case for case in QUANTIZABLE}

# Layers and modes in which what is stored or computed differs; tests cost seconds in JAX.
PAIRS = [
    *((case, mode) for case in SOME for mode in ("int8", "int4-blocks")),
    (_BY_NAME["dense"], "int8-weights"),
    (_BY_NAME["einsum-query"], "int4-channel"),
    (_BY_NAME["einsum-heads-first"], "int8-weights"),
    (_BY_NAME["einsum-experts"], "int4-blocks"),
    (_BY_NAME["embedding"], "int4-channel"),
    (_BY_NAME["reversible-tied-reverse-cap"], "int8"),
    (_BY_NAME["reversible-tied-reverse-cap"], "int4-channel"),
    (_BY_NAME["reversible-untied"], "int4-blocks"),
]
# Those that differ in how a gradient is found.
GRADIENT_PAIRS = [
    (_BY_NAME[name], mode)
    for name, mode in (
        ("dense", "int8"),
        ("dense", "int4-blocks"),
        ("einsum-query", "int8"),
        ("einsum-query", "int4-channel"),
        ("einsum-heads-first", "int8-weights"),
        ("embedding", "int4-blocks"),
        ("reversible-tied-reverse-cap", "int8"),
        ("reversible-untied-reverse", "int4-blocks"),
    )
]


def pair_ids(pairs):
    return [f"{case.name}-{mode}" for case, mode in pairs]


@contextlib.contextmanager
def quick_deletes():
    """Keras collects all garbage whenever a layer loses a variable; what is old is left out."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def quantize(layer, mode):
    """Quantizes a layer and returns how close it comes to the formula."""
    config, tolerance = MODES[mode]
    layer.quantize(config=config())
    return tolerance


def unpacked(packed, length, axis):
    """Two signed nibbles a byte, the low one first."""
    packed = np.moveaxis(packed.astype("int8"), axis, 0)
    low = ((packed & 15) ^ 8) - 8
    both = np.stack([low, packed >> 4], axis=1).reshape(-1, *packed.shape[1:])
    return np.moveaxis(both[:length], 0, axis)


def matrices(layer):
    """Returns the dequantized matrices of a quantized layer by name, in float64."""
    values = {
        v.name: np.array(keras.ops.convert_to_numpy(keras.ops.cast(v, _wide(v))))
        for v in layer.weights
        if "seed" not in v.name
    }
    # Nightly builds of Keras name this variable in another way than the attribute.
    if getattr(layer, "kernel_zero", None) is not None:
        values["kernel_zero"] = np.array(keras.ops.convert_to_numpy(layer.kernel_zero))
    if isinstance(layer, keras.layers.Embedding):
        shape = (layer.input_dim, layer.output_dim)
        found = {"embeddings": _matrix(layer, values, "embeddings", shape, axis=-1, pack=-1)}
        if not getattr(layer, "tie_weights", True):
            found["reverse_embeddings"] = _matrix(
                layer, values, "reverse_embeddings", shape[::-1], axis=0, pack=0
            )
        return found
    if isinstance(layer, keras.layers.EinsumDense):
        return {"kernel": _einsum_kernel(layer, values)}
    shape = (values["kernel"].shape[0], layer.units)
    return {"kernel": _matrix(layer, values, "kernel", shape, axis=0, pack=-1)}


def _wide(variable):
    return "int32" if "int" in variable.dtype else "float32"


def _matrix(layer, values, name, shape, axis, pack):
    """Dequantizes a matrix with a scale for each entry of the other axis than `axis`."""
    stored, scale = values[name], values[f"{name}_scale"].astype("float64")
    if layer.quantization_mode == "int8":
        return stored / np.expand_dims(scale, axis)
    stored = unpacked(stored, shape[pack], pack)
    if f"{name}_zero" not in values:
        return stored / np.expand_dims(scale, axis)
    size = layer.quantization_config.block_size
    groups = [entry // size for entry in range(shape[axis])]
    zero = values[f"{name}_zero"].astype("float64")
    return (stored - np.take(zero, groups, axis)) * np.take(scale, groups, axis)


def _einsum_kernel(layer, values):
    axes = kernel_axes(layer.equation)
    contracted = [axes.index(axis) for axis in split_einsum(layer.equation).contracted]
    sizes = dict(zip(axes, layer._matrix_shape("_kernel"), strict=True))
    shape = tuple(sizes.values())
    if layer.quantization_mode == "int8":
        # The scale has the kernel's other axes, in the output's order.
        output = layer.equation.split("->")[1]
        free = [axis for axis in output if axis in axes]
        scale = values["kernel_scale"].astype("float64").reshape([sizes[axis] for axis in free])
        scale = np.transpose(scale, [free.index(axis) for axis in axes if axis in free])
        return values["kernel"] / np.expand_dims(scale, contracted)
    rows = int(np.prod([shape[axis] for axis in contracted]))
    flat = (rows, int(np.prod(shape)) // rows)
    return _matrix(layer, values, "kernel", flat, axis=0, pack=-1).reshape(shape)


def expected(case, layer, inputs=None, overrides=None):
    """Returns the output by the formula with the dequantized matrices, in float64."""
    factors = {name: as_float64(v) for name, v in layer.adapter_variables().items()}
    return case.expected(layer, inputs, {**factors, **matrices(layer), **(overrides or {})})
