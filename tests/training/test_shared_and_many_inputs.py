"""Two inputs, two outputs and a layer in two places train as the same with one of each."""

import keras
import numpy as np
from keras import layers
from lora_cases import randomize, snapshot
from tiny_models import FEATURES, features, labels
from tolerances import FLOAT32_MODEL, assert_close

import keras_loraplus as klp

NAMES = ["shared", "side", "hidden", "one", "other"]
ONE, OTHER = labels(seed=3), labels(seed=4)


def two_towers(left, right):
    """`shared` sees both sides, the right one through `side`; the outputs are two heads."""
    shared = layers.Dense(8, activation="tanh", name="shared")
    sides = [shared(left), shared(layers.Dense(FEATURES, activation="tanh", name="side")(right))]
    x = layers.Dense(8, activation="tanh", name="hidden")(layers.Concatenate()(sides))
    return layers.Dense(3, name="one")(x), layers.Dense(3, name="other")(x)


def of_two_inputs():
    left, right = keras.Input((FEATURES,), name="left"), keras.Input((FEATURES,), name="right")
    one, other = two_towers(left, right)
    model = keras.Model({"left": left, "right": right}, {"one": one, "other": other})
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    inputs = {"left": features(seed=1), "right": features(seed=2)}
    return model, inputs, {"one": ONE, "other": OTHER}, {"one": loss, "other": loss}


def of_one_input():
    """Both inputs in one array, both outputs in one, and the sum of both losses."""

    def loss(targets, outputs):
        losses = keras.losses.sparse_categorical_crossentropy(targets, outputs, from_logits=True)
        return keras.ops.sum(losses, axis=-1)

    both = keras.Input((2 * FEATURES,))
    one, other = two_towers(both[:, :FEATURES], both[:, FEATURES:])
    model = keras.Model(both, keras.ops.stack([one, other], axis=1))
    inputs = np.concatenate([features(seed=1), features(seed=2)], axis=1)
    return model, inputs, np.stack([ONE, OTHER], axis=1), loss


def trained(make):
    """Returns the values of every layer, in the order of NAMES, and the losses."""
    model, inputs, targets, loss = make()
    chosen = [model.get_layer(name) for name in NAMES]
    for seed, layer in enumerate(chosen):
        randomize(layer.weights, seed, 0.4)
    report = klp.enable_lora_plus(model, rank=2)
    # Adapted once, though it stands in two places.
    assert sorted(layer.path for layer in report.adapted) == ["hidden", "shared", "side"]
    assert sorted(report.heads) == ["one", "other"]
    assert len(model.trainable_variables) == 3 * 2 + 2 * 2
    for seed, layer in enumerate(chosen):
        randomize(layer.trainable_variables, 10 + seed, 0.4)
    start = snapshot(model.trainable_variables)
    model.compile(klp.LoRAPlusAdamW(1e-2, lr_ratio=4.0, global_clipnorm=0.1), loss)
    history = model.fit(inputs, targets, batch_size=4, epochs=3, shuffle=False, verbose=0).history
    for before, variable in zip(start, model.trainable_variables, strict=True):
        assert np.all(keras.ops.convert_to_numpy(variable) != before), variable.path
    values = [snapshot(layer.weights) for layer in chosen]
    outputs = model.predict(inputs, verbose=0)
    klp.merge_lora_plus(model)
    merged = model.predict(inputs, verbose=0)
    for value, right in zip(keras.tree.flatten(merged), keras.tree.flatten(outputs), strict=True):
        assert_close(value, right, FLOAT32_MODEL)
    return values, history["loss"]


def test_the_same_training():
    values, losses = trained(of_two_inputs)
    right, right_losses = trained(of_one_input)
    assert right_losses[0] - right_losses[-1] > 1e-2
    assert_close(losses, right_losses, FLOAT32_MODEL)
    for name, found, expected in zip(NAMES, values, right, strict=True):
        assert len(found) == (5 if name in ("shared", "side", "hidden") else 2)
        for value, other in zip(found, expected, strict=True):
            assert_close(value, other, FLOAT32_MODEL)
