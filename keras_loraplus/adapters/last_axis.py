"""Rewrites the factors of Keras's own LoRA for einsum kernels into this library's (pure).

Keras splits a kernel at its last axis, whatever that axis means: A has the kernel's other axes and
the rank, B the rank and the last axis. Here the equation decides: contracted axes are A's, free
axes are B's (`split_einsum`). The product is the same tensor, often at a higher rank.
"""

import math
import string

import numpy as np

from keras_loraplus.layers.einsum_split import kernel_axes, split_einsum


def standard_factors(equation, a, b):
    """Returns factors of this library with the same product as a pair of Keras's own.

    With r the rank of the pair, A' and B' the result, and the kernel's last axis l:

        l free:        A'[c, (f, q)] = A[c, f, q]           B'[(f, q), f', l] = [f = f'] B[q, l]
        l contracted:  A'[c, l, (c', q)] = [c = c'] B[q, l]  B'[(c, q), f] = A[c, f, q]

    where c and f are the other contracted and free axes: the rank is r times the size of f, or
    of c. It stays r where there are none, as for an attention's output projection. Where that is
    more than any matrix of this size needs, or l is shared (experts), one factor is the product
    itself and the other the identity.

    Args:
        equation: The equation of the `keras.layers.EinsumDense`.
        a: Array, the kernel's axes but the last, then r.
        b: Array, r and the kernel's last axis.

    Returns:
        Tuple of float32 arrays `(A', B')`.

    Raises:
        ValueError: If the two do not fit each other or the equation.

    Example:
        >>> a, b = standard_factors("abc,cde->abde", np.ones((6, 2, 3)), np.ones((3, 5)))
        >>> a.shape, b.shape
        ((6, 6), (6, 2, 5))

    Source: `EinsumDense.enable_lora` of Keras 3.15.
    """
    axes, split = kernel_axes(equation), split_einsum(equation)
    if a.ndim != len(axes) or b.ndim != 2 or a.shape[-1] != b.shape[0]:
        raise ValueError(
            f"The factors of a kernel '{axes}' have {len(axes)} and 2 axes and share the rank. "
            f"Received: shapes {a.shape} and {b.shape}."
        )
    size = dict(zip(axes, (*a.shape[:-1], b.shape[1]), strict=True))
    sides = [math.prod(size[axis] for axis in side) for side in (split.contracted, split.free)]
    last, rank = axes[-1], a.shape[-1]
    side = split.free if last in split.free else split.contracted
    blocks = math.prod(size[axis] for axis in side if axis != last)
    if last in split.shared or blocks * rank > min(sides):
        pair = _product_and_identity(axes, split, size, a, b)
    else:
        pair = _blocks(axes, split, size, a, b)
    return tuple(np.ascontiguousarray(factor, "float32") for factor in pair)


def _blocks(axes, split, size, a, b):
    last, (rank, *copies) = axes[-1], _unused(axes)
    side = split.free if last in split.free else split.contracted
    others = side.replace(last, "")
    block = "".join(copies[: len(others)])
    # The identity on the other axes, with ones along the shared axes, which have nothing to choose.
    same = _identity(others, size)
    ones = np.ones([size[axis] for axis in split.shared])
    placed = f"{split.shared},{block}{others},{rank}{last}->"
    if last in split.free:
        new_a = np.einsum(f"{axes[:-1]}{rank}->{split.a_axes}{others}{rank}", a)
        new_b = np.einsum(f"{placed}{split.shared}{block}{rank}{split.free}", ones, same, b)
    else:
        new_a = np.einsum(f"{placed}{split.a_axes}{block}{rank}", ones, same, b)
        new_b = np.einsum(f"{axes[:-1]}{rank}->{split.shared}{others}{rank}{split.free}", a)
    return _with_rank_axis(split, size, new_a, new_b)


def _product_and_identity(axes, split, size, a, b):
    rank, *copies = _unused(axes)
    product = np.tensordot(a.astype("float64"), b.astype("float64"), 1)
    sides = [math.prod(size[axis] for axis in side) for side in (split.contracted, split.free)]
    smaller = split.free if sides[1] <= sides[0] else split.contracted
    block = "".join(copies[: len(smaller)])
    same = _identity(smaller, size)
    ones = np.ones([size[axis] for axis in split.shared])
    if smaller == split.free:
        new_a = np.einsum(f"{axes}->{split.a_axes}{smaller}", product)
        new_b = np.einsum(
            f"{split.shared},{block}{smaller}->{split.shared}{block}{smaller}", ones, same
        )
    else:
        new_a = np.einsum(f"{split.shared},{block}{smaller}->{split.a_axes}{block}", ones, same)
        new_b = np.einsum(f"{axes}->{split.shared}{smaller}{split.free}", product)
    return _with_rank_axis(split, size, new_a, new_b)


def _with_rank_axis(split, size, a, b):
    """Joins the axes that make up the rank."""
    shape = {
        side: [size[axis] for axis in side] for side in (split.a_axes, split.shared, split.free)
    }
    return (
        a.reshape([*shape[split.a_axes], -1]),
        b.reshape([*shape[split.shared], -1, *shape[split.free]]),
    )


def _identity(axes, size):
    shape = [size[axis] for axis in axes]
    return np.eye(math.prod(shape)).reshape([*shape, *shape])


def _unused(axes):
    return [letter for letter in string.ascii_letters if letter not in axes]
