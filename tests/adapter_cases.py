"""A small model with adapters and biases that train, and what the adapter tests ask of it."""

import keras
import numpy as np
from keras import ops
from tolerances import EXACT, assert_close


def small_model(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(7, activation="tanh"),
            keras.layers.Dense(6, activation="tanh"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(3),
        ]
    )


def perturb(model, seed=1):
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))


def inputs(shape=(4, 5)):
    return np.random.default_rng(2).normal(size=shape).astype("float32")


def values(model):
    return [ops.convert_to_numpy(variable) for variable in model.weights]


def assert_unchanged(model, before):
    after = values(model)
    assert len(after) == len(before)
    for now, then in zip(after, before, strict=True):
        assert_close(now, then, EXACT)
