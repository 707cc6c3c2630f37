"""Initial values of A and B.

numpy draws them from the seed that Keras gives each initializer: after one and the same
`keras.utils.set_random_seed` they are alike on every backend, and nothing is compiled for them.
With Keras's own initializers JAX compiles a program for every shape of A and of B; that was most of
the time of enabling a large backbone.
"""

import math

import keras
import numpy as np

from keras_loraplus import _compat


class Zeros(keras.initializers.Zeros):
    """Zeros that no backend computes."""

    def __call__(self, shape, dtype=None):
        """Returns zeros."""
        return _compat.on_device(np.zeros(shape, dtype))


class Uniform(keras.initializers.RandomUniform):
    """U(minval, maxval), drawn by numpy."""

    def __call__(self, shape, dtype=None):
        """Returns the same values on each call, as Keras's initializers do."""
        drawn = np.random.default_rng(self.seed).uniform(self.minval, self.maxval, shape)
        return _compat.on_device(drawn.astype(dtype))


class Normal(keras.initializers.RandomNormal):
    """N(mean, stddev^2), drawn by numpy."""

    def __call__(self, shape, dtype=None):
        """Returns the same values on each call, as Keras's initializers do."""
        drawn = np.random.default_rng(self.seed).normal(self.mean, self.stddev, shape)
        return _compat.on_device(drawn.astype(dtype))


def factor_initializers(init, fan_in, rank):
    """Returns the initializers of A and B.

    `"loraplus"`: A = 0, B ~ U(-1/sqrt(rank), 1/sqrt(rank)).
    `"lora"`: A ~ U(-1/sqrt(fan_in), 1/sqrt(fan_in)), B = 0.
    These are the Kaiming-uniform (a = sqrt 5) bounds of the torch reference. A pair
    is copied, so that layers with equal settings do not start with equal factors.

    Args:
        init: A checked `AdapterSpec.init`.
        fan_in: Number of inputs that A contracts.
        rank: The adapter's rank.

    Returns:
        Tuple `(a_initializer, b_initializer)`.
    """
    if init == "loraplus":
        return Zeros(), _symmetric_uniform(rank)
    if init == "lora":
        return _symmetric_uniform(fan_in), Zeros()
    return tuple(part.clone() for part in init)


def embedding_initializers(init, rank):
    """Returns the initializers of an embedding's A (table side) and B.

    `"loraplus"`: A = 0, B ~ U(-1/sqrt(rank), 1/sqrt(rank)). `"lora"`: A = 0, B ~ N(0, 1), as PEFT
    does for embeddings, where a row of A is read, not contracted.

    Args:
        init: A checked `AdapterSpec.init`.
        rank: The adapter's rank.

    Returns:
        Tuple `(a_initializer, b_initializer)`.
    """
    if init == "lora":
        return Zeros(), Normal(stddev=1.0)
    return factor_initializers(init, rank, rank)


def _symmetric_uniform(fan):
    bound = 1.0 / math.sqrt(fan)
    return Uniform(-bound, bound)
