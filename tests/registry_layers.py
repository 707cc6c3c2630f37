"""Layers that hold matrices of their own, as users write them, and adapters for them."""

import keras
import numpy as np
from keras import ops
from lora_cases import as_float64, randomize

import keras_loraplus as klp

INPUTS, HIDDEN, OUTPUTS, EXPERTS = 5, 7, 3, 2


@keras.saving.register_keras_serializable("tests")
class Gated(keras.layers.Layer):
    """`(tanh(x G) * (x U) + b) D`; saved by Keras's own rules, with no method for it."""

    def __init__(self, width=HIDDEN, **kwargs):
        super().__init__(**kwargs)
        self.width = width

    def build(self, input_shape):
        inputs = input_shape[-1]
        self.gate = self.add_weight(name="gate", shape=(inputs, self.width))
        self.offset = self.add_weight(name="offset", shape=(self.width,))
        self._up = self.add_weight(name="up", shape=(inputs, self.width))
        self.down = self.add_weight(name="down", shape=(self.width, OUTPUTS))

    def call(self, inputs):
        # Einsums, as its adapter's: torch's `matmul` rounds otherwise on some processors.
        gate = ops.tanh(ops.einsum("bi,ij->bj", inputs, self.gate))
        hidden = gate * ops.einsum("bi,ij->bj", inputs, self._up) + self.offset
        return ops.einsum("bj,jo->bo", hidden, self.down)


class GatedAdapter(klp.layers.MatrixAdapter):
    equations = {"gate": "bi,ij->bj", "_up": "bi,ij->bj", "down": "bj,jo->bo"}

    def call(self, inputs, training=None):
        gate = ops.tanh(self.product("gate", inputs, training))
        hidden = gate * self.product("_up", inputs, training) + self.offset
        return self.product("down", hidden, training)


@keras.saving.register_keras_serializable("tests")
class Bank(keras.layers.Layer):
    """The mean over experts of `x W[e]`; `alpha` is an argument of its own."""

    def __init__(self, alpha=0.5, **kwargs):
        super().__init__(**kwargs)
        self.alpha = alpha

    def build(self, input_shape):
        shape = (EXPERTS, input_shape[-1], OUTPUTS)
        self.kernels = self.add_weight(name="kernels", shape=shape)

    def call(self, inputs):
        return self.alpha * ops.mean(ops.einsum("bi,eio->ebo", inputs, self.kernels), axis=0)


class BankAdapter(klp.layers.MatrixAdapter):
    equations = {"kernels": "bi,eio->ebo"}
    groups = "e"

    def call(self, inputs, training=None):
        return self.alpha * ops.mean(self.product("kernels", inputs, training), axis=0)


def with_deltas(layer, attributes, delta):
    """Returns W + s A B in float64 by attribute, from the variables as they are."""
    found = []
    for attribute in attributes:
        name = attribute.strip("_")
        a, b = (as_float64(getattr(layer, f"lora_kernel_{name}_{side}")) for side in "ab")
        kernel = as_float64(getattr(layer, attribute))
        found.append(kernel + layer.adapter.scale * np.einsum(delta, a, b))
    return found


def gated_formula(layer, x):
    gate, up, down = with_deltas(layer, ("gate", "_up", "down"), "ir,rj->ij")
    return (np.tanh(x @ gate) * (x @ up) + as_float64(layer.offset)) @ down


def bank_formula(layer, x):
    (kernels,) = with_deltas(layer, ("kernels",), "eir,ero->eio")
    return layer.alpha * np.mean([x @ kernel for kernel in kernels], axis=0)


def data(count=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, INPUTS)).astype("float32")


def model_with(layer):
    """Returns a built model of one such layer and a head, with weights that are not zero."""
    head = keras.layers.Dense(2, name="head")
    model = keras.Sequential([keras.Input((INPUTS,)), layer, head])
    randomize(model.weights, seed=3)
    return model
