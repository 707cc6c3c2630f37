"""`W + s A B` of a frozen matrix, in blocks of rows, and whether it is sure to be finite."""

import math

import keras
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.layers import quantized

# Float32 numbers of a block: few enough for the memory of one block's intermediate values to be
# used again by the next, many enough for a block to be worth its calls.
BLOCK = 2**21
# The largest numbers that sums in float32 reach in the kernel's dtype.
_LARGEST = {"float16": 65504.0}
_LARGEST_FLOAT32 = 3.3e38


def merged_matrix(layer, pair):
    """Returns `W + s A B`, formed in float32 and cast to the matrix's own dtype.

    Beside the result, only blocks of it are in memory. A quantized matrix, and one that is laid out
    over devices, is merged as a whole; that of a quantized matrix stays float32.

    Args:
        layer: A LoRA+ layer.
        pair: One of its `Factors`.
    """
    a = ops.convert_to_tensor(getattr(layer, pair.a))
    b = ops.multiply(ops.convert_to_tensor(getattr(layer, pair.b)), layer.adapter.scale)
    if layer.quantization_mode is not None:
        return ops.add(quantized.dequantized(layer, pair.kernel), pair.product(a, b))
    kernel = getattr(layer, pair.kernel)
    value = ops.convert_to_tensor(kernel)
    factors = layer.factors()
    blocks = []
    for start, rows in _row_blocks(kernel):
        part = pair.product(
            _rows(a, start, rows, factors[pair.a].kernel_axes),
            _rows(b, start, rows, factors[pair.b].kernel_axes),
        )
        frozen = ops.cast(_rows(value, start, rows, range(len(kernel.shape))), "float32")
        blocks.append(ops.cast(ops.add(frozen, part), kernel.dtype))
    return blocks[0] if len(blocks) == 1 else ops.concatenate(blocks, axis=0)


def is_surely_finite(layer, pair):
    """Returns whether no entry of `W + s A B` can be NaN or infinite, without forming it.

        |W + s A B|  <=  ||W|| + |s| ||A|| ||B||    (Frobenius norms)

    in every entry, so that a bound below half of the dtype's largest number settles it; the other
    half is for rounding. NaN and infinity make the bound NaN or infinite.

    Args:
        layer: A LoRA+ layer.
        pair: One of its `Factors`.

    Returns:
        True if it is sure; False if the entries have to be looked at.
    """
    if layer.quantization_mode is not None:
        return False
    kernel = getattr(layer, pair.kernel)
    a, b = (_norm(getattr(layer, name)) for name in (pair.a, pair.b))
    bound = _norm(kernel) + abs(layer.adapter.scale) * a * b
    dtype = keras.backend.standardize_dtype(kernel.dtype)
    return bound <= _LARGEST.get(dtype, _LARGEST_FLOAT32) / 2


def _norm(variable):
    value = ops.convert_to_tensor(variable)
    squares = 0.0
    for start, rows in _row_blocks(variable):
        part = ops.cast(_rows(value, start, rows, range(len(variable.shape))), "float32")
        squares += float(ops.convert_to_numpy(ops.sum(ops.square(part))))
    return math.sqrt(squares)


def _row_blocks(variable):
    """Returns the first row and the number of rows of every block."""
    count = variable.shape[0]
    rows = max(1, BLOCK // math.prod(variable.shape[1:]))
    if rows >= count or _compat.is_laid_out(variable):
        return [(0, count)]
    return [(start, min(rows, count - start)) for start in range(0, count, rows)]


def _rows(value, start, rows, kernel_axes):
    """Returns the part of a value that belongs to some rows of the kernel."""
    axes = list(kernel_axes)
    if 0 not in axes or value.shape[axes.index(0)] == rows:
        return value
    starts, shape = [0] * len(axes), list(value.shape)
    starts[axes.index(0)], shape[axes.index(0)] = start, rows
    return ops.slice(value, starts, shape)
