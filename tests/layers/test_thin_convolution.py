"""A convolution with few filters as one product of matrices: its values, sizes, and when it is."""

import functools

import keras
import numpy as np
import pytest
from autodiff import gradients
from lora_cases import numpy_conv
from tolerances import FLOAT32_LAYER, assert_close

import keras_loraplus as kl
from keras_loraplus.layers.conv import LowRankConv
from keras_loraplus.layers.thin_conv import thin_convolution

# Spatial sizes, window, dilation.
SHAPES = [
    ((9,), (3,), (1,)),
    ((9,), (4,), (2,)),
    ((6, 7), (3, 3), (1, 1)),
    ((6, 7), (2, 5), (1, 1)),
    ((9, 8), (3, 1), (3, 2)),
    ((5, 4, 6), (3, 2, 3), (2, 1, 1)),
    ((6, 7), (1, 1), (1, 1)),
]


def operands(sizes, window, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((2, *sizes, 5), (*window, 5, 3))
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


@pytest.mark.parametrize(
    ("sizes", "window", "dilation", "padding"),
    [(*shape, padding) for shape in SHAPES for padding in ("valid", "same")]
    + [(*shape, "causal") for shape in SHAPES[:2]],
)
def test_it_is_the_convolution(sizes, window, dilation, padding):
    x, kernel = operands(sizes, window)
    actual = thin_convolution(*map(keras.ops.convert_to_tensor, (x, kernel)), padding, dilation)
    exact = [each.astype("float64") for each in (x, kernel)]
    expected = numpy_conv(*exact, (1,) * len(window), padding, dilation)
    assert_close(keras.ops.convert_to_numpy(actual), expected, FLOAT32_LAYER)
    symbolic = keras.KerasTensor((None, *(None for _ in sizes), 5))
    found = keras.ops.shape(thin_convolution(symbolic, kernel, padding, dilation))
    assert found == (None, *(None for _ in sizes), 3)


@pytest.mark.parametrize(("sizes", "window", "dilation"), SHAPES)
def test_its_gradients_are_those_of_the_convolution(sizes, window, dilation):
    variables = [keras.Variable(each) for each in operands(sizes, window)]

    def found(convolution):
        return gradients(lambda: keras.ops.sum(keras.ops.sin(convolution(*variables))), variables)

    direct = functools.partial(keras.ops.conv, padding="same", dilation_rate=dilation)
    thin = functools.partial(thin_convolution, padding="same", dilation=dilation)
    for actual, expected in zip(found(thin), found(direct), strict=True):
        assert_close(actual, expected, FLOAT32_LAYER)
        assert abs(expected).max() > 0.1


def layer_of(padding="same", **options):
    layer = kl.layers.LoRAPlusConv2D(4, 3, padding=padding, rank=2, **options)
    layer.build((None, None, None, options.get("groups", 1) * 18))
    rng = np.random.default_rng(1)
    for variable in (layer.lora_kernel_a, layer.lora_kernel_b):
        variable.assign(rng.normal(size=variable.shape))
    return layer


@pytest.mark.parametrize("groups", [1, 2])
def test_images_of_any_size(groups):
    layer = layer_of(groups=groups)
    channels = 18 * groups
    model = keras.Sequential([keras.Input((None, None, channels)), layer])
    a, b, kernel = (
        np.asarray(keras.ops.convert_to_numpy(variable), "float64")
        for variable in (layer.lora_kernel_a, layer.lora_kernel_b, layer.kernel)
    )
    for sizes in ((6, 7), (4, 9)):
        x = np.random.default_rng(2).normal(size=(2, *sizes, channels)).astype("float32")
        exact = x.astype("float64"), kernel + a @ b
        expected = numpy_conv(*exact, (1, 1), "same", (1, 1), groups)
        assert_close(model.predict(x, verbose=0), expected, FLOAT32_LAYER)


@pytest.mark.parametrize(
    ("options", "is_thin"),
    [
        ({}, True),
        ({"groups": 2}, True),
        ({"dilation_rate": 2}, True),
        ({"strides": 2}, False),
        ({"max_rank": 3}, False),
    ],
)
def test_where_jax_convolves_by_a_product(options, is_thin, monkeypatch):
    """Two convolutions otherwise: the frozen kernel's and A's."""
    layer, convolutions = layer_of(**options), []
    convolved = LowRankConv._convolved
    monkeypatch.setattr(
        LowRankConv,
        "_convolved",
        lambda *arguments: convolutions.append(1) or convolved(*arguments),
    )
    layer(np.ones((2, 6, 7, options.get("groups", 1) * 18), "float32"))
    assert len(convolutions) == (1 if is_thin and keras.backend.backend() == "jax" else 2)
