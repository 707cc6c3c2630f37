"""Training runs that are stopped in one process and resumed in another.

Ten steps are two epochs of five batches. `first_half` stops after the first, `resume_all` goes on
in whatever process calls it, and `straight` does both at once.
"""

import pathlib
import warnings

import keras
import numpy as np
from tiny_models import CLASSES, FEATURES, compile_model, features, filled, labels

import keras_loraplus as klp
from keras_loraplus import _compat
from keras_loraplus.structure import layers_by_path, variables_by_path

STEPS = 5
BATCH = 4


class Interrupted(Exception):
    """What ends the first process."""


class Interrupt(keras.callbacks.Callback):
    """Ends training where the second epoch would begin."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise Interrupted


def plain(dropout=0.0):
    """A functional model; with dropout also one layer of each kind that keeps a state."""
    inputs = keras.Input((FEATURES,))
    x = keras.layers.Dense(8, activation="tanh", name="first")(inputs)
    if dropout:
        x = keras.layers.BatchNormalization(name="norm")(x)
        x = keras.layers.Dropout(dropout)(x)
        x = keras.layers.GaussianNoise(0.1, seed=5)(x)
    x = keras.layers.Dense(8, activation="tanh", name="second")(x)
    model = filled(keras.Model(inputs, keras.layers.Dense(CLASSES, name="head")(x)))
    trainable = ".*norm.*|.*first/bias" if dropout else ".*first/bias"
    klp.enable_lora_plus(model, rank=2, alpha=5, dropout=dropout, trainable=trainable)
    return model, features(STEPS * BATCH)


def hub(dropout=0.0):
    """A KerasHub classifier; its backbone is adapted, its head trains."""
    import keras_hub

    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=31,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        dropout=dropout,
        max_sequence_length=6,
    )
    model = filled(
        keras_hub.models.BertTextClassifier(
            backbone, CLASSES, preprocessor=None, dropout=dropout, activation=None
        )
    )
    klp.enable_lora_plus(model, rank=2, alpha=5, dropout=dropout)
    ids = np.random.default_rng(0).integers(1, 31, size=(STEPS * BATCH, 6)).astype("int32")
    inputs = {
        "token_ids": ids,
        "segment_ids": np.zeros_like(ids),
        "padding_mask": np.ones_like(ids),
    }
    return model, inputs


MODELS = {
    "plain": plain,
    "hub": hub,
    "plain-dropout": lambda: plain(0.3),
    "hub-dropout": lambda: hub(0.3),
}


def made(name, seed):
    """Returns a compiled model and its inputs; the seed decides what is not from a file."""
    keras.utils.set_random_seed(seed)
    model, inputs = MODELS[name]()
    optimizer = klp.LoRAPlusAdamW(1e-2, lr_ratio=4.0, weight_decay=0.01)
    if name.startswith("plain-"):
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=4.0, dynamic_growth_steps=3
        )
    compile_model(model, optimizer)
    return model, inputs


def fit(model, inputs, callbacks=(), epochs=2, initial_epoch=0):
    return model.fit(
        inputs,
        labels(STEPS * BATCH),
        batch_size=BATCH,
        epochs=epochs,
        initial_epoch=initial_epoch,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )


def straight(name):
    """Trains ten steps; returns all values by name."""
    model, inputs = made(name, seed=1)
    fit(model, inputs)
    return values(model)


def first_half(name, folder):
    """Trains five steps, saves in every way that is tested, and returns all values by name."""
    folder = pathlib.Path(folder) / name
    folder.mkdir()
    model, inputs = made(name, seed=1)
    callbacks = [
        keras.callbacks.ModelCheckpoint(folder / "callback.weights.h5", save_weights_only=True),
        keras.callbacks.BackupAndRestore(folder / "backup", save_freq="epoch"),
        klp.callbacks.AdapterCheckpoint(folder / "run.safetensors"),
    ]
    if name == "plain":
        callbacks.append(keras.callbacks.ModelCheckpoint(folder / "callback.keras"))
    try:
        fit(model, inputs, [*callbacks, Interrupt()])
    except Interrupted:
        pass
    else:
        raise AssertionError("the first half was not stopped")
    model.save_weights(folder / "model.weights.h5")
    return values(model)


def by_weights(file, load=keras.Model.load_weights):
    def resume(name, folder):
        model, inputs = made(name, seed=2)
        load(model, folder / file)
        fit(model, inputs, initial_epoch=1)
        return model

    return resume


def by_keras_file(file):
    def resume(name, folder):
        _, inputs = made(name, seed=2)
        model = keras.models.load_model(folder / file)
        fit(model, inputs, initial_epoch=1)
        return model

    return resume


def by_callback(make):
    def resume(name, folder):
        model, inputs = made(name, seed=2)
        history = fit(model, inputs, [make(folder)])
        assert history.epoch == [1], history.epoch
        return model

    return resume


def without_optimizer_state(name, folder):
    """What Keras does where the optimizer is not built: a control."""
    model, inputs = made(name, seed=2)
    model.load_weights(folder / "model.weights.h5")
    compile_model(model, klp.LoRAPlusAdamW(1e-2, lr_ratio=4.0, weight_decay=0.01))
    fit(model, inputs, initial_epoch=1)
    return model


WAYS = {
    "load_weights": by_weights("model.weights.h5"),
    "klp.load_weights": by_weights("model.weights.h5", klp.load_weights),
    "ModelCheckpoint": by_weights("callback.weights.h5"),
    "BackupAndRestore": by_callback(lambda f: keras.callbacks.BackupAndRestore(f / "backup")),
    "AdapterCheckpoint": by_callback(
        lambda f: klp.callbacks.AdapterCheckpoint(f / "run.safetensors")
    ),
    "load_model": by_keras_file("callback.keras"),
    "without optimizer state": without_optimizer_state,
}

EXACT = [
    ("plain", "load_weights"),
    ("plain", "ModelCheckpoint"),
    ("plain", "BackupAndRestore"),
    ("plain", "load_model"),
    ("hub", "klp.load_weights"),
    ("hub", "BackupAndRestore"),
    ("plain-dropout", "AdapterCheckpoint"),
    ("hub-dropout", "AdapterCheckpoint"),
]
# Ways that lose something: what is compared can tell.
CONTROLS = [("plain", "without optimizer state"), ("plain-dropout", "load_weights")]


def resume_all(folder):
    """Goes on with every run in this process and writes all values of each to a file."""
    folder = pathlib.Path(folder)
    for name, way in EXACT + CONTROLS:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Skipping variable loading")
            model = WAYS[way](name, folder / name)
        np.savez(folder / f"{name}-{way}.npz", **values(model))


def values(model):
    """Returns weights, seeds and optimizer state as arrays, by names that outlive a reload."""
    found = {
        f"weight {key}": variable for key, variable in variables_by_path(model, lambda v: 1).items()
    }
    for path, layer in layers_by_path(model).items():
        for number, generator in enumerate(_compat.seed_generators(layer)):
            found[f"seed {path} {number}"] = generator.state
    for number, variable in enumerate(model.optimizer.variables):
        found[f"optimizer {number}"] = variable
    # np.savez would make folders of slashes.
    return {
        key.replace("/", "|"): np.array(keras.ops.convert_to_numpy(variable))
        for key, variable in found.items()
    }
