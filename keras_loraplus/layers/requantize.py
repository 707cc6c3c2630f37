"""Puts merged values back into quantized matrices, or makes the layers float again."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.layers import quantized
from keras_loraplus.layers.adopt import release, retire

# What Keras 3.15.1 stores quantized matrices in, over all modes and layers.
_STORED = (
    "_kernel",
    "kernel_scale",
    "kernel_zero",
    "g_idx",
    "quantized_kernel",
    "awq_scales",
    "_embeddings",
    "embeddings_scale",
    "embeddings_zero",
    "reverse_embeddings",
    "reverse_embeddings_scale",
    "reverse_embeddings_zero",
)


# What else a mode leaves on a layer: of 3.15.1, the last of 3.16's nightly builds.
_LEFT_OVER = (
    "inputs_quantizer",
    "_int4_block_size",
    "gptq_unpacked_column_size",
    "calibration_pending",
)


@dataclasses.dataclass(frozen=True)
class RequantizationError:
    """What re-quantizing a merged matrix costs.

    Attributes:
        path: Path of the layer and name of the matrix.
        mode: Keras's name of the mode.
        of_matrix: Norm of the rounding error over the norm of `W + s A B`.
        of_adapter: The same over the norm of `s A B`: 1 means that as much is lost as the adapter
            changed.
    """

    path: str
    mode: str
    of_matrix: float
    of_adapter: float


def why_not_requantizable(layer):
    """Returns why a merged layer cannot be quantized again in its own mode, or None."""
    mode = layer.quantization_mode
    if mode in quantized.CALIBRATED:
        return f"{mode} needs the data it was calibrated with"
    return None


def requantized(layer, values):
    """Quantizes merged matrices as the layer's own were.

    A scratch layer of the Keras class does it, so that mode, block size and quantizers are those of
    the layer, from float32.

    Args:
        layer: A quantized layer; it is not changed.
        values: What its `merged_values` returned.

    Returns:
        Tuple: dict from attribute to the value to assign, list of `RequantizationError`.
    """
    scratch = _scratch(layer)
    for name, value in values.items():
        getattr(scratch, name).assign(value)
    scratch.quantize(config=_config_of(layer))
    errors = []
    for name, value in values.items():
        merged, base, kept = (
            np.asarray(ops.convert_to_numpy(tensor), "float64")
            for tensor in (
                value,
                quantized.dequantized(layer, name),
                quantized.dequantized(scratch, name),
            )
        )
        lost = float(np.linalg.norm(kept - merged))
        norms = np.linalg.norm(merged), np.linalg.norm(merged - base)
        of_matrix, of_adapter = (lost / norm if norm else 0.0 for norm in map(float, norms))
        path = f"{layer.path or layer.name}/{name.lstrip('_')}"
        errors.append(RequantizationError(path, layer.quantization_mode, of_matrix, of_adapter))
    found = {name: getattr(scratch, name) for name in _STORED if _has(scratch, name)}
    return {name: ops.copy(variable) for name, variable in found.items()}, errors


def release_as_float(layer, values, restore):
    """Takes the adapter off a quantized layer and makes it a float layer of merged matrices.

    Args:
        layer: A quantized layer with an adapter.
        values: What its `merged_values` returned.
        restore: Function of the layer that puts its trainable flags back.
    """
    policy = _float_policy(layer)
    release(layer)
    restore(layer)
    dropped = [_compat.drop_attribute(layer, name) for name in _STORED if _has(layer, name)]
    retire(layer, dropped)
    layer.quantization_config = None
    layer._is_quantized = False
    for leftover in _LEFT_OVER:
        if hasattr(layer, leftover):
            setattr(layer, leftover, None)
    layer.dtype_policy = policy
    with _compat.unlocked(layer), _compat.path_scope(layer):
        for name, value in values.items():
            variable = layer.add_weight(
                name=name.lstrip("_"),
                shape=tuple(value.shape),
                initializer="zeros",
                regularizer=_regularizer_of(layer, name),
            )
            variable.assign(value)
            setattr(layer, name, variable)
    # Matrices stand before the bias, as in a layer that never was quantized.
    matrices = [getattr(layer, name) for name in values]
    _compat.thaw_variables(layer, matrices)
    for variable in matrices:
        variable.trainable = layer.trainable


def _scratch(layer):
    """Returns a float32 Keras layer of the same matrices, built."""
    plain = quantized.keras_class(type(layer))
    config = plain.get_config(layer)
    for name in ("lora_rank", "lora_alpha", "gptq_unpacked_column_size"):
        config.pop(name, None)
    config.update(dtype="float32", quantization_config=None)
    for name in [name for name in config if name.endswith(("_regularizer", "_constraint"))]:
        config[name] = None
    scratch = plain.from_config(config)
    if isinstance(scratch, keras.layers.Dense):
        scratch.build((None, layer._matrix_shape("_kernel")[0]))
    elif isinstance(scratch, keras.layers.EinsumDense):
        scratch.build(next(iter(_compat.build_shapes(layer).values())))
    else:
        scratch.build()
    return scratch


def _config_of(layer):
    config = layer.quantization_config
    if config is not None:
        return config
    if layer.quantization_mode == "int8":
        return keras.quantizers.Int8QuantizationConfig()
    policy = quantized.policy_of(layer)
    block_size = getattr(layer, "_int4_block_size", getattr(policy, "block_size", None))
    return keras.quantizers.Int4QuantizationConfig(block_size=block_size)


def _float_policy(layer):
    # By dtypes: `DTypePolicyMap.get_config` (3.15.1) takes the names off the policies it holds.
    if layer.compute_dtype == layer.variable_dtype:
        return layer.compute_dtype
    return f"mixed_{layer.compute_dtype}"


def _has(layer, name):
    return isinstance(getattr(layer, name, None), keras.Variable)


def _regularizer_of(layer, name):
    return getattr(layer, f"{name.lstrip('_')}_regularizer", None)
