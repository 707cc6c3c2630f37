"""Small models of every kind, built, with non-zero weights everywhere."""

import keras
import numpy as np
from keras import layers
from lora_cases import randomize

FEATURES, CLASSES, VOCABULARY, LENGTH = 6, 3, 17, 5


def features(count=12, seed=0):
    return np.random.default_rng(seed).normal(size=(count, FEATURES)).astype("float32")


def tokens(count=12, seed=0):
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, size=(count, LENGTH))
    ids[:, -1] = 0
    return ids.astype("int32")


def labels(count=12, seed=1):
    return np.random.default_rng(seed).integers(0, CLASSES, size=(count,)).astype("int32")


def functional():
    """Two hidden dense layers of equal size, then a head."""
    inputs = keras.Input((FEATURES,))
    x = layers.Dense(8, activation="tanh", name="first")(inputs)
    x = layers.Dense(8, activation="tanh", name="second")(x)
    outputs = layers.Dense(CLASSES, name="head")(x)
    return filled(keras.Model(inputs, outputs))


def sequential():
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            layers.Dense(8, activation="tanh", name="first"),
            layers.Dense(8, activation="tanh", name="second"),
            layers.Dense(CLASSES, name="head"),
        ]
    )
    return filled(model)


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """A model with a call of its own and layers in attributes and in a list."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(8, activation="tanh", name="first")
        self.more = [layers.Dense(8, activation="tanh", name="second")]
        self.head = layers.Dense(CLASSES, name="head")

    def build(self, input_shape):
        self.first.build(input_shape)
        self.more[0].build((None, 8))
        self.head.build((None, 8))
        self.built = True

    def call(self, inputs):
        x = self.first(inputs)
        for layer in self.more:
            x = layer(x)
        return self.head(x)


def subclassed():
    model = Subclassed(name="subclassed")
    model(features())
    return filled(model)


def nested():
    """A functional model whose head is in a nested model."""
    inputs = keras.Input((FEATURES,))
    body_in = keras.Input((FEATURES,))
    body = keras.Model(body_in, layers.Dense(8, activation="tanh", name="first")(body_in))
    top = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(8, activation="tanh", name="second"),
            layers.Dense(CLASSES, name="head"),
            layers.Activation("linear"),
        ]
    )
    return filled(keras.Model(inputs, top(body(inputs))))


def normalised():
    """Batch and layer normalisation between dense layers, and a convolution."""
    inputs = keras.Input((8, 4))
    x = layers.Conv1D(8, 3, padding="same", name="conv")(inputs)
    x = layers.BatchNormalization(name="batch_norm")(x)
    x = layers.LayerNormalization(name="layer_norm")(x)
    x = layers.Dense(8, activation="tanh", name="hidden")(x)
    x = layers.GlobalAveragePooling1D()(x)
    model = filled(keras.Model(inputs, layers.Dense(CLASSES, name="head")(x)))
    norm = model.get_layer("batch_norm")
    norm.moving_variance.assign(np.abs(keras.ops.convert_to_numpy(norm.moving_variance)) + 0.5)
    return model


def sequences(count=12, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 8, 4)).astype("float32")


def text():
    """An embedding with a mask, attention, and a classifier."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(VOCABULARY, 8, mask_zero=True, name="table")(inputs)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.Dense(8, activation="tanh", name="hidden")(x)
    x = layers.GlobalAveragePooling1D()(x)
    return filled(keras.Model(inputs, layers.Dense(CLASSES, name="head")(x)))


def filled(model):
    randomize(model.weights, seed=3, scale=0.4)
    return model


MODELS = {
    "functional": (functional, features),
    "sequential": (sequential, features),
    "subclassed": (subclassed, features),
    "nested": (nested, features),
    "normalised": (normalised, sequences),
    "text": (text, tokens),
}


def compile_model(model, optimizer=None, **kwargs):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.1), loss=loss, **kwargs)


def fit(model, inputs, epochs=1, batch_size=4):
    """Trains on random labels and returns the history."""
    return model.fit(
        inputs,
        labels(len(inputs)),
        epochs=epochs,
        batch_size=batch_size,
        shuffle=False,
        verbose=0,
    )
