"""Gradients by the active backend's own means, as numpy arrays."""

import keras
import numpy as np


def gradients(function, variables):
    """Returns d function() / d variable for every variable; `function` returns a scalar."""
    return {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}[keras.backend.backend()](
        function, variables
    )


def _jax(function, variables):
    import jax

    def loss(values):
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return function()

    return [np.asarray(g) for g in jax.grad(loss)([v.value for v in variables])]


def _tensorflow(function, variables):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = function()
    found = tape.gradient(loss, [v.value for v in variables])
    return [np.asarray(tf.convert_to_tensor(g)) for g in found]


def _torch(function, variables):
    for variable in variables:
        variable.value.grad = None
    function().backward()
    found = [variable.value.grad.detach().cpu().numpy() for variable in variables]
    for variable in variables:
        variable.value.grad = None
    return found


def finite_differences(function, value, step=1e-5):
    """Returns the gradient of a float64 function of one array, by central differences."""
    gradient = np.zeros_like(value)
    for index in np.ndindex(*value.shape):
        moved = value.copy()
        moved[index] += step
        above = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient
