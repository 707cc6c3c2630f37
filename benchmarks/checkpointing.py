"""Gradient checkpointing: the same adapted model with and without `keras.RematScope`."""

import contextlib
import functools

import keras

import keras_loraplus as klp
from benchmarks.arms import RANK, RATE, SEED, Training
from benchmarks.models import CLASSES, CROSS_ENTROPY, class_labels, image_batch
from benchmarks.names import CHECKPOINTING

SIZES = {"layers": 6, "width": 384, "heads": 6, "inner": 1536, "batch": 4, "length": 256}
MODES, UNFILTERED = CHECKPOINTING[:-1], CHECKPOINTING[-1]


class Unfiltered(Training):
    """Training whose steps run without Keras's filter for tracebacks.

    torch ends a recomputation with an exception. The filter (Keras 3.15.1) catches it and raises it
    again, which leaves its frames, and with them what was recomputed, in a cycle until Python's
    collector comes.
    """

    def __call__(self):
        with _unfiltered():
            return super().__call__()

    def seconds(self, steps):
        with _unfiltered():
            return super().seconds(steps)


@contextlib.contextmanager
def _unfiltered():
    keras.config.disable_traceback_filtering()
    try:
        yield
    finally:
        keras.config.enable_traceback_filtering()


class Block(keras.layers.Layer):
    """A transformer layer whose `call` takes the sequence alone.

    Keras 3.15.1 passes keyword arguments on to the backend's checkpointing: JAX then traces
    `training`, on which KerasHub's layers branch, and TensorFlow accepts none.
    """

    def __init__(self, width, heads, inner, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(heads, width // heads, name="attention")
        self.attention_norm = keras.layers.LayerNormalization(name="attention_norm")
        self.inner = keras.layers.Dense(inner, activation="gelu", name="inner")
        self.outer = keras.layers.Dense(width, name="outer")
        self.norm = keras.layers.LayerNormalization(name="norm")

    def build(self, shape):
        self.attention.build(shape, shape)
        self.attention_norm.build(shape)
        self.inner.build(shape)
        self.outer.build(self.inner.compute_output_shape(shape))
        self.norm.build(shape)

    def call(self, x):
        x = self.attention_norm(x + self.attention(x, x))
        return self.norm(x + self.outer(self.inner(x)))

    def compute_output_shape(self, shape):
        return shape


def checkpointing():
    """An adapted transformer; an arm for each thing that is recomputed."""
    modes = CHECKPOINTING if keras.backend.backend() == "torch" else MODES
    return {mode: functools.partial(checkpointed, mode, SIZES) for mode in modes}


def checkpointed(mode, sizes):
    keras.utils.set_random_seed(SEED)
    scope = contextlib.nullcontext()
    names = [f"block_{number}" for number in range(sizes["layers"])]
    if mode == "activations":
        scope = keras.RematScope(mode="activations")
    elif mode in ("blocks", UNFILTERED):
        scope = keras.RematScope(mode="list_of_layers", layer_names=names)
    inputs = x = keras.Input((sizes["length"], sizes["width"]))
    with scope:
        for name in names:
            x = Block(sizes["width"], sizes["heads"], sizes["inner"], name=name)(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, name="head")(x))
    klp.enable_lora_plus(model, rank=RANK)
    model.compile(klp.LoRAPlusAdamW(RATE), loss=CROSS_ENTROPY())
    batch = image_batch((sizes["length"], sizes["width"]), sizes["batch"])
    training = Unfiltered if mode == UNFILTERED else Training
    return training(model, batch, class_labels(sizes["batch"]))
