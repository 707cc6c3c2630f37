"""Rule 2: nothing of the kernel's size is formed from A and B, forward or backward."""

import keras
import numpy as np
import pytest
from factored import formed
from keras import layers
from lora_cases import factors, randomize

from keras_loraplus import layers as kl

# name: (Keras layer, LoRA+ layer, arguments, input shape, reverse). All sizes are distinct primes,
# so that a value with as many entries as the kernel is of its shape.
SHAPES = {
    "dense": (layers.Dense, kl.LoRAPlusDense, (13,), (3, 5, 11), False),
    "einsum": (
        layers.EinsumDense,
        kl.LoRAPlusEinsumDense,
        ("bqm,muh->bquh", (None, 7, 13)),
        (3, 5, 11),
        False,
    ),
    "experts": (
        layers.EinsumDense,
        kl.LoRAPlusEinsumDense,
        ("eti,eih->eth", (5, 13)),
        (3, 5, 11),
        False,
    ),
    "embedding": (layers.Embedding, kl.LoRAPlusEmbedding, (17, 13), (3, 5), False),
    "reversible": (layers.ReversibleEmbedding, kl.LoRAPlusReversibleEmbedding, (17, 13), (3, 5), 0),
    "reversible-reverse": (
        layers.ReversibleEmbedding,
        kl.LoRAPlusReversibleEmbedding,
        (17, 13),
        (3, 5, 13),
        True,
    ),
    "conv1d": (layers.Conv1D, kl.LoRAPlusConv1D, (13, 3), (1, 7, 11), False),
    "conv2d": (layers.Conv2D, kl.LoRAPlusConv2D, (13, 3), (1, 7, 5, 11), False),
    "conv3d": (layers.Conv3D, kl.LoRAPlusConv3D, (13, 2), (1, 5, 5, 5, 11), False),
}


def loss_of(layer, shape, reverse):
    rng = np.random.default_rng(0)
    if isinstance(layer, layers.Embedding) and not reverse:
        inputs = keras.ops.convert_to_tensor(rng.integers(0, 17, size=shape).astype("int32"))
    else:
        inputs = keras.ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))
    kwargs = {"reverse": True} if reverse else {}
    layer(inputs, **kwargs)
    return lambda: keras.ops.sum(keras.ops.square(layer(inputs, **kwargs)))


# Casting adds values of the kernel's size: those of the kernel alone are no fault.
IN_LOW_PRECISION = ["dense", "einsum", "reversible-reverse", "conv1d"]


@pytest.mark.parametrize(
    "name, dtype",
    [(n, "float32") for n in SHAPES] + [(n, "mixed_bfloat16") for n in IN_LOW_PRECISION],
)
def test_no_value_of_the_kernels_size(name, dtype):
    _, lora, arguments, shape, reverse = SHAPES[name]
    layer = lora(*arguments, rank=2, dtype=dtype)
    loss = loss_of(layer, shape, reverse)
    randomize(factors(layer))
    size = int(np.prod(getattr(layer, layer._factors()[0].kernel).shape))
    found = formed(loss, factors(layer), size)
    assert found == []
    # The trace did see A and B: something of A's own size, its gradient, is there.
    assert formed(loss, factors(layer), int(np.prod(factors(layer)[0].shape)))


# Unpacking and scaling the kernel is no fault either; a gradient of its size would be.
@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("name", ["dense", "einsum", "embedding", "reversible-reverse"])
def test_no_value_of_a_quantized_kernels_size(name, mode):
    plain, lora, arguments, shape, reverse = SHAPES[name]
    layer = plain(*arguments)
    inner = loss_of(layer, shape, reverse)
    layer.quantize(mode)
    lora.from_layer(layer, rank=2)
    randomize(factors(layer))
    size = int(np.prod(layer._matrix_shape(layer._factors()[0].kernel)))
    assert formed(inner, factors(layer), size) == []
    assert formed(inner, factors(layer), int(np.prod(factors(layer)[0].shape)))


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_no_gradient_of_a_quantized_kernel_behind_an_adapter(mode):
    """The second kernel's product reads what the first adapter made."""
    first, second = layers.Dense(7), layers.Dense(13)
    inputs = np.random.default_rng(0).normal(size=(3, 11)).astype("float32")
    second(first(inputs))
    for layer in (first, second):
        layer.quantize(mode)
        kl.LoRAPlusDense.from_layer(layer, rank=2)
        randomize(factors(layer))
    trained = [*factors(first), *factors(second)]
    assert formed(lambda: keras.ops.sum(keras.ops.square(second(first(inputs)))), trained, 91) == []


@pytest.mark.parametrize("name", [n for n in SHAPES if not n.startswith("reversible")])
def test_the_check_finds_what_keras_lora_forms(name):
    plain, _, arguments, shape, reverse = SHAPES[name]
    layer = plain(*arguments)
    loss = loss_of(layer, shape, reverse)
    size = int(np.prod(layer.weights[0].shape))
    layer.enable_lora(2)
    trained = [v for v in layer.trainable_variables if v.name.startswith("lora")]
    assert formed(loss, trained, size)
