"""A layer's convolution against Keras's: every bit of its values and gradients."""

import keras
import numpy as np
import pytest
from autodiff import gradients
from tolerances import EXACT, assert_close

from keras_loraplus import _compat

# Inputs (spatial sizes and channels), kernel, strides, dilation.
CASES = {
    "1d": ((9, 5), (3, 5, 4), 1, 1),
    "2d": ((9, 8, 5), (3, 3, 5, 7), 1, 1),
    "even window": ((9, 8, 5), (2, 4, 5, 3), 1, 1),
    "strides": ((9, 8, 16), (3, 3, 16, 8), 2, 1),
    "dilation": ((9, 8, 5), (3, 2, 5, 8), 1, 2),
    "one channel": ((9, 8, 1), (3, 3, 1, 4), 1, 1),
    "one pixel": ((1, 1, 6), (1, 1, 6, 4), 1, 1),
    "groups": ((9, 8, 6), (3, 3, 3, 8), 1, 1),
    "wide": ((28, 28, 64), (3, 3, 64, 64), 1, 1),
    "3d": ((5, 6, 7, 3), (3, 2, 3, 3, 4), 1, 1),
    "3d strides": ((5, 6, 7, 3), (3, 3, 3, 3, 4), 2, 1),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_keras_s_bit_for_bit(case, padding, swapped):
    sizes, window, strides, dilation = CASES[case]
    rng = np.random.default_rng(0)
    shapes = (window, (2, sizes[1], sizes[0], *sizes[2:]) if swapped else (2, *sizes))
    values = [rng.normal(size=shape).astype("float32") for shape in shapes]
    kernel, inputs = (keras.Variable(value) for value in values)
    settings = {"strides": strides, "padding": padding, "dilation_rate": dilation}

    def found(convolution):
        def outputs():
            # Axes that are swapped in memory: what a layer before may hand over.
            x = keras.ops.swapaxes(inputs, 1, 2) if swapped else keras.ops.multiply(inputs, 1)
            return convolution(x, kernel, data_format="channels_last", **settings)

        loss = gradients(lambda: keras.ops.sum(keras.ops.sin(outputs())), [kernel, inputs])
        return [keras.ops.convert_to_numpy(outputs()), *loss]

    for actual, expected in zip(found(_compat.convolution), found(keras.ops.conv), strict=True):
        assert_close(actual, expected, EXACT)
        assert abs(expected).max() > 0.1


def test_channels_first_is_left_to_keras(monkeypatch):
    asked = []
    monkeypatch.setattr(keras.ops, "conv", lambda *values, **named: asked.append((values, named)))
    inputs, kernel = keras.ops.ones((2, 3, 5, 5)), keras.ops.ones((3, 3, 3, 4))
    _compat.convolution(inputs, kernel, "channels_first", padding="same")
    ((values, named),) = asked
    assert values[0] is inputs and values[1] is kernel
    assert named == {"data_format": "channels_first", "padding": "same"}
