"""Stacks of Dense layers: the contract's, and those whose sizes are varied one at a time."""

import functools

import keras
import numpy as np

import keras_loraplus as klp
from benchmarks.arms import RANK, RATE, SEED, Training
from keras_loraplus import _compat

# What is held while one of them is varied, and the values it takes. The rank is high enough for the
# adapter's part of a step to stand out from the noise at every width.
HELD = {"width": 512, "tokens": 512, "rank": 64, "layers": 2}
VARIED = {
    "width": (256, 512, 1024, 2048, 4096),
    "tokens": (32, 128, 512, 2048, 4096),
    "rank": (1, 4, 16, 64, 256),
    "layers": (1, 2, 4, 8, 16),
}


def dense_stack():
    """A training step on six Dense layers 2048 wide, batch 32, rank 8."""
    prepare = {"ours": ours, "native": native, "limit": limit}
    return {
        arm: functools.partial(dense_training, function, width=2048, tokens=32, layers=6, rank=RANK)
        for arm, function in prepare.items()
    }


def growth(what):
    """Adapted and frozen stacks for every value of one size."""
    return {
        f"{arm}/{value}": functools.partial(
            dense_training, function, activation=None, layer=layer, **{**HELD, what: value}
        )
        for value in VARIED[what]
        for arm, function, layer in (
            ("ours", ours, keras.layers.Dense),
            ("limit", limit, FrozenDense),
        )
    }


class FrozenDense(keras.layers.Dense):
    """A frozen layer that forms the gradient of its inputs as an adapted one does.

    What an adapted layer takes beyond this one is the adapter's.
    """

    def call(self, inputs, training=None):
        kernel = keras.ops.stop_gradient(self.kernel)
        outputs = keras.ops.add(_compat.matmul_of_frozen(inputs, kernel), self.bias)
        return outputs if self.activation is None else self.activation(outputs)


def dense_training(
    prepare, width, tokens, layers, rank, activation="relu", layer=keras.layers.Dense
):
    keras.utils.set_random_seed(SEED)
    stack = [layer(width, activation=activation) for _ in range(layers)]
    model = keras.Sequential([keras.Input((width,)), *stack])
    rng = np.random.default_rng(SEED)
    x, y = (rng.normal(size=(tokens, width)).astype("float32") for _ in range(2))
    model.compile(prepare(model, rank), "mse")
    return Training(model, x, y)


def ours(model, rank):
    klp.enable_lora_plus(model, rank=rank, targets=".*dense.*")
    return klp.LoRAPlusAdamW(RATE)


def native(model, rank):
    for layer in model.layers:
        layer.enable_lora(rank)
        layer.bias.trainable = False
    return keras.optimizers.AdamW(RATE)


def limit(model, rank):
    """No adapter: only the first bias trains, so all of it is run backward."""
    for variable in model.weights:
        variable.trainable = variable is model.layers[0].bias
    return keras.optimizers.AdamW(RATE)
