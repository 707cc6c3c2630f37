"""What quantized Keras layers store, and how their frozen side is computed.

Keras 3.15.1 keeps a quantized matrix packed, beside scales and zero points, and computes with it in
a method for each mode. Those attributes and methods are not public; they are read here alone. Later
builds of Keras have views of quantized matrices, which are asked where there is one.
"""

import types

import keras
from keras import ops

from keras_loraplus import _compat

_DENSE = ("int8", "int4", "gptq", "awq")
_TABLE = ("int8", "int4")
MODES = {
    keras.layers.Dense: _DENSE,
    keras.layers.EinsumDense: _DENSE,
    keras.layers.ReversibleEmbedding: _TABLE,
    keras.layers.Embedding: _TABLE,
}

# Modes whose matrix is stored once calibrated, and cannot be made again without the data for it.
CALIBRATED = ("gptq", "awq")


def keras_class(layer_class):
    """Returns the Keras class with quantized modes that a layer's class is or extends, or None."""
    return next((known for known in MODES if issubclass(layer_class, known)), None)


def why_not_adaptable(layer):
    """Returns why an adapter cannot stand beside a quantized layer, or None.

    Args:
        layer: A built layer with a `quantization_mode`.
    """
    mode, layer_class = layer.quantization_mode, type(layer)
    known = keras_class(layer_class)
    if mode == "float8":
        return "it is quantized to float8, whose scales are trained along with its kernel"
    if known is None or mode not in MODES[known]:
        return f"it is quantized to {mode}, in which adapters of its kind do not exist"
    if mode in CALIBRATED and not _compat.is_calibrated(layer):
        return f"it is quantized to {mode} and not calibrated yet"
    for method in ("call", "quantized_call", f"_{mode}_call", "_quantization_geometry"):
        own = [c for c in layer_class.__mro__ if method in vars(c) and issubclass(c, known)]
        if any(c not in (known, *known.__mro__) and not _is_ours(c) for c in own):
            return (
                f"it is quantized to {mode}, and {layer_class.__name__} overrides `{method}`: what "
                "it computes cannot be told"
            )
    return None


def _is_ours(layer_class):
    return layer_class.__module__.startswith("keras_loraplus.")


def why_not_quantizable(layer, mode):
    """Returns why a layer with an adapter cannot be quantized, or None.

    Args:
        layer: A layer with an adapter.
        mode: Keras's name of the mode.
    """
    known = keras_class(type(layer))
    plain = layer.plain_class
    if mode == "float8":
        return "the scales of float8 are trained along with the kernel, which is frozen here"
    if mode in CALIBRATED:
        return f"{mode} calibrates plain layers: quantize first, then enable LoRA+"
    if known is None or mode not in MODES[known]:
        return f"Keras has no {mode} mode for a {plain.__name__}"
    if plain is not known:
        return f"Keras quantizes no subclasses, and {plain.__name__} is one of {known.__name__}"
    return None


class _Bare:
    """A layer as its product needs it: without what is applied once the adapter has been added.

    `values` stand in for variables of those names.
    """

    bias = None
    activation = None
    logit_soft_cap = None
    lora_enabled = False

    def __init__(self, layer, values=()):
        self.__dict__.update(values)
        self.__dict__["_bare_layer"] = layer

    def __getattr__(self, name):
        return getattr(self._bare_layer, name)

    def _quantization_geometry(self):
        # What a strategy of Keras's computes with; of the layer itself it would add the adapter.
        return type(self._bare_layer._quantization_geometry())(self)


def product(layer, inputs):
    """Returns the product of the inputs and a quantized dense or einsum kernel, no bias added.

    Keras's own method for the mode computes it, and its gradient for the inputs, so that nothing
    changes where A B is zero.

    Args:
        layer: A quantized layer.
        inputs: Tensor of the layer's compute dtype.

    Returns:
        Tensor of the compute dtype.
    """
    if _gradient_fails(layer):
        kernel = ops.cast(dequantized(layer, "_kernel"), layer.compute_dtype)
        return ops.einsum(layer.equation, inputs, ops.stop_gradient(kernel))
    call = _compat.quantized_mode_call(keras_class(type(layer)), layer.quantization_mode)
    return ops.cast(call(_Bare(layer), inputs), layer.compute_dtype)


def _gradient_fails(layer):
    """Whether Keras's gradient arranges the scales twice: int8 weights alone, on torch, in 3.15."""
    return (
        isinstance(layer, keras.layers.EinsumDense)
        and layer.quantization_mode == "int8"
        and hasattr(keras.layers.EinsumDense, "_int8_call")
        and layer.inputs_quantizer is None
        and keras.backend.backend() == "torch"
    )


def rows(layer, tokens):
    """Returns the rows of a quantized table at integer positions.

    Only these rows are unpacked and scaled, where Keras unpacks the whole table.

    Args:
        layer: A quantized embedding.
        tokens: Integers of any shape.

    Returns:
        Tensor `(..., output_dim)` of the compute dtype.
    """
    flat = ops.reshape(tokens, (-1,))
    taken = ops.take(layer._embeddings, flat, axis=0)
    if layer.quantization_mode == "int4":
        taken = keras.quantizers.unpack_int4(taken, layer.output_dim, axis=-1)
    taken = ops.cast(taken, layer.compute_dtype)
    scale = ops.take(layer.embeddings_scale, flat, axis=0)
    if _has_groups(layer, "embeddings_zero"):
        zero = ops.take(layer.embeddings_zero, flat, axis=0)
        taken = _scaled_groups(taken, scale, zero, layer.g_idx, axis=-1)
    else:
        taken = ops.divide(taken, ops.expand_dims(scale, axis=-1))
    taken = ops.cast(taken, layer.compute_dtype)
    return ops.reshape(taken, (*ops.shape(tokens), layer.output_dim))


_TABLE_VARIABLES = (
    "_embeddings",
    "embeddings_scale",
    "embeddings_zero",
    "g_idx",
    "reverse_embeddings",
    "reverse_embeddings_scale",
    "reverse_embeddings_zero",
)


def logits(layer, inputs):
    """Returns what a quantized table makes of the inputs in reverse, not capped.

    Keras's method (3.15.1) rounds the inputs and gives them no gradient, so that no layer before
    the logits would learn. Here the gradient is that of the product with the dequantized table, as
    in Keras's dense layers.

    Args:
        layer: A quantized `ReversibleEmbedding`.
        inputs: Tensor `(..., output_dim)`.

    Returns:
        Tensor `(..., input_dim)`.
    """
    names = [name for name in _TABLE_VARIABLES if getattr(layer, name, None) is not None]
    known = keras.layers.ReversibleEmbedding
    call = _compat.quantized_mode_call(known, layer.quantization_mode)

    @ops.custom_gradient
    def reverse(inputs, *values):
        bare = _Bare(layer, dict(zip(names, values, strict=True)))

        def gradient(*args, upstream=None):
            if upstream is None:
                (upstream,) = args
            if layer.tie_weights:
                kernel = dequantized(bare, "_embeddings")
            else:
                kernel = ops.transpose(dequantized(bare, "reverse_embeddings"))
            found = ops.matmul(upstream, ops.cast(kernel, upstream.dtype))
            return (ops.cast(found, inputs.dtype), *(None for _ in values))

        return call(bare, inputs, reverse=True), gradient

    return reverse(inputs, *(ops.convert_to_tensor(getattr(layer, name)) for name in names))


def give_gradient(layer):
    """Makes a reversible table pass gradients through its logits once it is quantized.

    Without an adapter of its own it would compute them by Keras's method, and what is adapted
    before it would learn from a wrong gradient. Values stay what they were. A bound method in the
    instance's dictionary is what Keras finds first.
    """
    known = keras.layers.ReversibleEmbedding
    if isinstance(layer, known) and type(layer).quantized_call is known.quantized_call:
        layer.__dict__["quantized_call"] = types.MethodType(_call_with_gradient, layer)


def take_gradient(layer):
    """Undoes `give_gradient`."""
    if getattr(layer.__dict__.get("quantized_call"), "__func__", None) is _call_with_gradient:
        del layer.__dict__["quantized_call"]


def _call_with_gradient(self, inputs, reverse=False):
    if not reverse:
        return type(self).quantized_call(self, inputs)
    return soft_capped(logits(self, inputs), self.logit_soft_cap)


def soft_capped(values, cap):
    """Returns `cap tanh(values / cap)`, or the values where there is no cap."""
    if cap is None:
        return values
    return ops.multiply(ops.tanh(ops.divide(values, cap)), cap)


def stored(layer, name):
    """Returns the variable that holds a frozen matrix, packed if the layer is quantized.

    Args:
        layer: A layer.
        name: Attribute of the matrix in the layer that is not quantized.
    """
    if layer.quantization_mode in CALIBRATED and name == "_kernel":
        return layer.quantized_kernel
    return getattr(layer, name)


def matrix_shape(layer, name):
    """Returns the shape of a frozen matrix as the layer computes with it, not as it is packed."""
    mode = layer.quantization_mode
    if mode is not None and (view := _compat.quantized_view(layer, name)) is not None:
        return view.shape
    if name == "_embeddings":
        return (layer.input_dim, layer.output_dim)
    if name == "reverse_embeddings":
        return (layer.output_dim, layer.input_dim)
    if mode in (None, "int8"):
        return tuple(getattr(layer, name).shape)
    if isinstance(layer, keras.layers.EinsumDense):
        return tuple(layer.original_kernel_shape)
    if mode == "int4":
        return (layer._orig_input_dim, layer._orig_output_dim)
    return tuple(layer.kernel_shape)


def dequantized(layer, name):
    """Returns the float32 value of a frozen matrix.

    Args:
        layer: A layer, quantized or not.
        name: Attribute of the matrix in the layer that is not quantized.
    """
    mode = layer.quantization_mode
    if mode is None:
        return ops.cast(getattr(layer, name), "float32")
    if (view := _compat.quantized_view(layer, name)) is not None:
        return view.dequantize("float32")
    shape = matrix_shape(layer, name)
    if mode in CALIBRATED:
        return ops.reshape(_calibrated(layer), shape)
    if name == "_embeddings":
        return _unpacked(layer, layer._embeddings, "embeddings", shape[-1], -1, by_row=True)
    if name == "reverse_embeddings":
        return _unpacked(layer, layer.reverse_embeddings, name, shape[0], 0)
    if mode == "int8":
        scale = ops.cast(layer.kernel_scale, "float32")
        if hasattr(layer, "_adjust_scale_for_dequant"):
            scale = layer._adjust_scale_for_dequant(scale)
        return ops.divide(ops.cast(layer._kernel, "float32"), scale)
    columns = layer.kernel_scale.shape[-1]
    return ops.reshape(_unpacked(layer, layer._kernel, "kernel", columns, -1), shape)


def _unpacked(layer, values, name, length, axis, by_row=False):
    """Returns a matrix with a scale for each column, each row, or each group of them."""
    if layer.quantization_mode == "int4":
        values = keras.quantizers.unpack_int4(ops.convert_to_tensor(values), length, axis=axis)
    values = ops.cast(values, "float32")
    scale = ops.cast(getattr(layer, f"{name}_scale"), "float32")
    if _has_groups(layer, f"{name}_zero"):
        zero = getattr(layer, f"{name}_zero")
        return _scaled_groups(values, scale, zero, layer.g_idx, axis=-1 if by_row else 0)
    return ops.divide(values, ops.expand_dims(scale, axis=-1) if by_row else scale)


def _has_groups(layer, zero):
    return layer.quantization_mode == "int4" and getattr(layer, zero, None) is not None


def _scaled_groups(values, scale, zero, groups, axis):
    groups = ops.cast(groups, "int32")
    scale = ops.take(scale, groups, axis=axis)
    zero = ops.cast(ops.take(zero, groups, axis=axis), scale.dtype)
    return ops.multiply(ops.subtract(values, zero), scale)


def _calibrated(layer):
    values = ops.convert_to_tensor(layer.quantized_kernel)
    columns = layer.kernel_scale.shape[0]
    if layer.quantization_mode == "awq" or policy_of(layer).weight_bits == 4:
        values = keras.quantizers.unpack_int4(values, columns, axis=0, dtype="uint8")
    scale = ops.cast(layer.kernel_scale, "float32")
    values = _scaled_groups(
        ops.cast(values, "float32"), scale, layer.kernel_zero, layer.g_idx, axis=-1
    )
    kernel = ops.transpose(values)
    if layer.quantization_mode == "awq":
        scales = ops.cast(layer.awq_scales, "float32")
        kernel = ops.divide(kernel, ops.expand_dims(scales, axis=-1))
    return kernel


def policy_of(layer):
    """Returns the layer's own dtype policy, where it has a `DTypePolicyMap` the entry in that."""
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return policy[layer.path]
    return policy
