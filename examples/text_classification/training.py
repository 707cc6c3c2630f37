"""Builds, trains and measures a classifier. Choose the backend before importing this."""

import dataclasses
import time
import warnings

import keras
import keras_hub
import numpy as np

import keras_loraplus as klp
from text_classification.console import InputError, one_line

METHODS = ("loraplus", "lora", "full")


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast things train: the head at `head_multiplier` times the learning rate.

    `lr_ratio` is the rate of B over the rate of A; plain LoRA is a ratio of 1.
    """

    learning_rate: float
    lr_ratio: float = 1.0
    head_multiplier: float = 1.0


class BatchHistory(keras.callbacks.Callback):
    """Keeps each batch's loss and accuracy, which Keras shows as averages over the epoch so far."""

    def on_train_begin(self, logs=None):
        self.loss, self.accuracy = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.sums = {"loss": 0.0, "accuracy": 0.0}

    def on_train_batch_end(self, batch, logs=None):
        for name, values in (("loss", self.loss), ("accuracy", self.accuracy)):
            total = float(logs[name]) * (batch + 1)
            values.append(total - self.sums[name])
            self.sums[name] = total


def build_classifier(preset, classes, dtype="float32"):
    """Returns a KerasHub classifier with pretrained weights and a new head."""
    try:
        return keras_hub.models.TextClassifier.from_preset(
            preset, num_classes=classes, preprocessor=None, dtype=dtype
        )
    except Exception as error:  # KerasHub raises many kinds, from JSON to HTTP errors
        raise InputError(f"cannot load the preset {preset!r}: {one_line(error)[:300]}") from error


def quantize(model, mode, chosen=None):
    """Quantizes the pretrained weights; the new head trains, and stays as it is.

    `chosen` tells which layers, all unless given.
    """
    with warnings.catch_warnings():
        # Keras names every layer that has nothing to quantize.
        warnings.filterwarnings("ignore", message="Layer .* does not have a `quantize`")
        model.backbone.quantize(mode, filters=chosen)


def tokenize(preset, texts, sequence_length):
    """Returns the model's inputs for a list of texts, as numpy arrays."""
    try:
        preprocessor = keras_hub.models.TextClassifierPreprocessor.from_preset(
            preset, sequence_length=sequence_length
        )
    except Exception as error:  # as above
        raise InputError(
            f"cannot load the tokenizer of {preset!r}: {one_line(error)[:300]}"
        ) from error
    return {name: np.asarray(value) for name, value in preprocessor(list(texts)).items()}


def make_optimizer(model, rates, steps):
    """Returns LoRA+ AdamW with a rate that falls linearly to zero over the run.

    At a ratio of 1, or without adapters, this is `keras.optimizers.AdamW` with a rate for the head.
    """
    return klp.LoRAPlusAdamW(
        keras.optimizers.schedules.PolynomialDecay(rates.learning_rate, steps, 0.0),
        lr_ratio=rates.lr_ratio,
        lr_multipliers=dict.fromkeys(head_patterns(model), rates.head_multiplier),
    )


def head_patterns(model):
    """Returns patterns for the layers of a KerasHub task that are not its backbone's."""
    backbone = {id(variable) for variable in model.backbone.variables}
    head = [v.path for v in model.trainable_variables if id(v) not in backbone]
    return sorted({path.rsplit("/", 1)[0] + "/.*" for path in head})


def compile_classifier(model, optimizer):
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def steps_in(rows, batch_size, epochs):
    return max(1, -(-rows // batch_size) * epochs)


def train(model, inputs, labels, *, validation, batch_size, epochs, verbose):
    """Trains a compiled model; returns its learning curves and the seconds it took."""
    curves = BatchHistory()
    start = time.perf_counter()
    history = model.fit(
        inputs,
        labels,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=validation,
        # KerasHub turns arrays into a dataset of fixed order. The rows come shuffled already.
        shuffle=False,
        callbacks=[curves],
        verbose=verbose,
    )
    return {
        "seconds": time.perf_counter() - start,
        "loss": curves.loss,
        "accuracy": curves.accuracy,
        "validation_loss": history.history["val_loss"],
        "validation_accuracy": history.history["val_accuracy"],
    }


def evaluate(model, inputs, labels, batch_size):
    """Returns loss and accuracy of a compiled model."""
    loss, accuracy = model.evaluate(inputs, labels, batch_size=batch_size, verbose=0)
    return float(loss), float(accuracy)


def save_plain(model, preset, classes, path, dtype="float32", mode=None):
    """Saves a model without the optimizer it was trained with.

    KerasHub compiles every task it makes, so that a file is expected to hold the state of that
    optimizer; one that holds another's, or none, is loaded with a warning.
    """
    copy = build_classifier(preset, classes, dtype)
    if mode is not None:
        packed = {la.path for la in model.backbone._flatten_layers() if la.quantization_mode}
        quantize(copy, mode, lambda layer: layer.path in packed)
    copy.set_weights(model.get_weights())
    copy.save(path)


def count(variables):
    return int(sum(np.prod(variable.shape) for variable in variables))
