"""The two thin factors beside a frozen matrix: how they are made, padded and multiplied."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops


@dataclasses.dataclass(frozen=True)
class Factors:
    """One frozen matrix of a layer and the two factors beside it.

    Attributes:
        kernel: Name of the attribute that holds the frozen variable.
        a: Name of the attribute that holds A.
        b: Name of the attribute that holds B.
        product: Function of the float32 values of A and B that returns A B in the
            kernel's shape.
        split: The `EinsumSplit` that the factors follow, or None for two matrices.
    """

    kernel: str
    a: str
    b: str
    product: Any
    split: Any = None


@dataclasses.dataclass(frozen=True)
class Factor:
    """How one factor is made.

    Attributes:
        name: Name of the variable.
        shape: Shape at the adapter's own rank.
        initializer: Keras initializer of that shape.
        fan: How many inputs (A) or outputs (B) one of its matrices has.
        kernel_axes: For every axis the kernel's axis that it is, None for the rank.
        kernel: Name of the attribute that holds the frozen variable.
    """

    name: str
    shape: tuple
    initializer: Any
    fan: int
    kernel_axes: tuple
    kernel: str = "_kernel"

    @property
    def rank_axis(self):
        """Position of the rank in the shape."""
        return self.kernel_axes.index(None)

    @property
    def rank(self):
        """The adapter's own rank."""
        return self.shape[self.rank_axis]

    def shape_at(self, width):
        """Returns the shape with `width` in place of the rank."""
        shape = list(self.shape)
        shape[self.rank_axis] = width
        return tuple(shape)

    def initial(self, width):
        """Returns an initializer of the shape at `width`: zeros stand beyond the rank.

        Zeros on both sides keep a zero gradient: that of A is `x^T (g B^T)`, that of B
        `(x A)^T g`. So what stands beyond the rank never trains.
        """
        return self.initializer if width == self.rank else _Padded(self, width)

    def padded(self, value, width):
        """Returns a value at the rank with zeros up to `width`."""
        pads = [[0, 0] for _ in self.shape]
        pads[self.rank_axis][1] = width - self.rank
        return ops.pad(value, pads) if width > self.rank else value

    def stripped(self, value):
        """Returns a numpy value without what stands beyond the rank."""
        return np.take(value, range(self.rank), axis=self.rank_axis)


class _Padded(keras.initializers.Initializer):
    def __init__(self, factor, width):
        self.factor, self.width = factor, width

    def __call__(self, shape, dtype=None):
        value = self.factor.initializer(self.factor.shape, dtype=dtype)
        return self.factor.padded(value, self.width)
