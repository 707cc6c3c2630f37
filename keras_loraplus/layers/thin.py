"""What an adapter computes, as pairs of thin numpy matrices that are measured, never multiplied."""

import string

import numpy as np
from keras import ops

from keras_loraplus.layers.conv import LowRankConv
from keras_loraplus.layers.einsum_dense import LoRAPlusEinsumDense
from keras_loraplus.layers.einsum_split import split_einsum
from keras_loraplus.layers.embedding import LoRAPlusEmbedding


def product_norm(left, right):
    """Returns the Frobenius norm of `left @ right`, summed over groups, from two r x r matrices.

        ||L R||^2 = trace(L^T L R R^T)

    so that nothing of the size of the product is formed. In float64 what cancels in the product is
    lost below about 1e-8 of ||L|| ||R||.

    Args:
        left: Array (groups, n, r).
        right: Array (groups, r, m).

    Returns:
        A Python float.

    Example:
        >>> left, right = np.array([[[3.0], [4.0]]]), np.array([[[2.0, 0.0]]])
        >>> product_norm(left, right)
        10.0
    """
    left, right = np.asarray(left, "float64"), np.asarray(right, "float64")
    left_gram = np.matmul(left.swapaxes(1, 2), left)  # (groups, r, r)
    right_gram = np.matmul(right, right.swapaxes(1, 2))  # (groups, r, r)
    return float(np.sqrt(max(np.sum(left_gram * right_gram), 0.0)))


def update_factors(pair, a, b):
    """Returns A and B as stacks of matrices whose products are the update of the kernel.

    Args:
        pair: The layer's `Factors`.
        a: Value of A as a numpy array.
        b: Value of B.

    Returns:
        Tuple of arrays (groups, n, r) and (groups, r, m). There is one group, except where an
        einsum's kernel has axes that input and output share (experts).
    """
    if pair.split is not None:
        return _einsum_left(pair.split, a), _einsum_right(pair.split, b)
    return a.reshape(1, -1, a.shape[-1]), b[None]


def output_factors(layer, inputs, a, b, reverse=False):
    """Returns two stacks of thin matrices whose products are the adapter's output without s.

    The output is linear in A and in B, so that with a change of A in place of A the result is the
    change of the output that it makes.

    Args:
        layer: A LoRA+ layer.
        inputs: What the adapter received, a numpy array: tokens for an embedding.
        a: A, or a change of it, as a numpy array.
        b: B, or a change of it.
        reverse: Whether a `ReversibleEmbedding` computed logits.

    Returns:
        Tuple of arrays (groups, positions, r) and (groups, r, outputs).
    """
    if isinstance(layer, LoRAPlusEmbedding):
        if not reverse:
            rows = a[inputs.astype("int64")]
            return rows.reshape(1, -1, a.shape[-1]), b[None]
        flat = inputs.reshape(-1, inputs.shape[-1])
        if layer.tie_weights:
            return (flat @ b.T)[None], a.T[None]
        return (flat @ a)[None], b[None]
    if isinstance(layer, LowRankConv):
        return _conv_inner(layer, inputs, a), _conv_right(layer, b)
    if isinstance(layer, LoRAPlusEinsumDense):
        split = split_einsum(layer.equation)
        return _einsum_inner(split, inputs, a), _einsum_right(split, b)
    return (inputs.reshape(-1, a.shape[0]) @ a)[None], b[None]


def _einsum_left(split, a):
    own = split.a_axes + split.rank_axis
    a = a.transpose([own.index(axis) for axis in split.shared + split.contracted + split.rank_axis])
    groups = int(np.prod(a.shape[: len(split.shared)], dtype="int64"))
    return a.reshape(groups, -1, a.shape[-1])


def _einsum_right(split, b):
    shared = len(split.shared)
    groups = int(np.prod(b.shape[:shared], dtype="int64"))
    return b.reshape(groups, b.shape[shared], -1)


def _einsum_inner(split, inputs, a):
    operands, inner = split.down.split("->")
    rest = inner.replace(split.rank_axis, "")
    for axis in split.shared:
        rest = rest.replace(axis, "")
    equation = f"{operands}->{split.shared}{rest}{split.rank_axis}"
    # numpy's fast path takes no ellipsis.
    equation = _without_ellipsis(equation, inputs.ndim)
    inner = np.einsum(equation, inputs, a, optimize=True)
    groups = int(np.prod(inner.shape[: len(split.shared)], dtype="int64"))
    return inner.reshape(groups, -1, a.shape[-1])


def _without_ellipsis(equation, input_axes):
    if "..." not in equation:
        return equation
    named = len(equation.split(",")[0].replace("...", ""))
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    return equation.replace("...", "".join(unused[: input_axes - named]))


def _conv_right(layer, b):
    groups = layer.groups
    return b.reshape(b.shape[0], groups, layer.filters // groups).transpose(1, 0, 2)


def _conv_inner(layer, inputs, a):
    # The layer's own convolution, with its strides, padding and dilation, in float32.
    inputs = ops.convert_to_tensor(inputs.astype("float32"))
    if layer.groups > 1:
        inputs = layer._groups_to_batch(inputs)
    inner = layer._convolved(inputs, ops.convert_to_tensor(a.astype("float32")))
    inner = np.asarray(ops.convert_to_numpy(inner), "float64")
    inner = np.moveaxis(inner, layer._channel_axis, -1)
    inner = inner.reshape(-1, layer.groups, *inner.shape[1:])
    return np.moveaxis(inner, 1, 0).reshape(layer.groups, -1, inner.shape[-1])
