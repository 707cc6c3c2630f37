"""K03b, K19: weight files from before enabling load into the right places."""

import h5py
import keras
import numpy as np
import pytest
from lora_cases import all_factors, randomize, randomize_factors, snapshot
from tiny_models import (
    CLASSES,
    FEATURES,
    MODELS,
    compile_model,
    features,
    filled,
    fit,
    normalised,
    sequences,
)

import keras_loraplus as klp

not_fitting = pytest.mark.filterwarnings("ignore:Skipping nested container")


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def groups(path):
    """Returns every dataset's name in a weights file."""
    found = []
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.append(name) if hasattr(item, "shape") else None)
    return found


PARTS = [(name, ()) for name in MODELS] + [
    ("normalised", ".*beta"),
    ("normalised", ".*gamma"),
    ("normalised", ".*norm.*"),
    ("functional", ".*bias"),
]


@pytest.mark.parametrize("name, trainable", PARTS)
def test_base_weights_load_after_enabling(name, trainable, tmp_path):
    make, inputs = MODELS[name]
    model = make()
    expected = to_numpy(model(inputs()))
    weights = {v.path: to_numpy(v).copy() for v in model.weights if "seed" not in v.path}
    model.save_weights(tmp_path / "base.weights.h5")
    klp.enable_lora_plus(model, rank=2, trainable=trainable)
    randomize([v for v in model.weights if "lora" not in v.path], seed=77)
    model.load_weights(tmp_path / "base.weights.h5")
    for variable in model.weights:
        if variable.path in weights:
            np.testing.assert_array_equal(to_numpy(variable), weights[variable.path])
    np.testing.assert_array_equal(to_numpy(model(inputs())), expected)
    before = snapshot(all_factors(model))
    compile_model(model, klp.LoRAPlusAdamW(1e-2))
    losses = fit(model, inputs(), epochs=4).history["loss"]
    assert losses[-1] < losses[0]
    for variable, value in zip(all_factors(model), before, strict=True):
        assert not np.array_equal(to_numpy(variable), value), variable.path


@pytest.mark.parametrize("name", MODELS)
def test_enabling_keeps_the_names_in_weight_files(name, tmp_path):
    model = MODELS[name][0]()
    model.save_weights(tmp_path / "base.weights.h5")
    klp.enable_lora_plus(model, rank=2)
    model.save_weights(tmp_path / "adapted.weights.h5")
    base, adapted = groups(tmp_path / "base.weights.h5"), groups(tmp_path / "adapted.weights.h5")
    added = {n for n in adapted if n.split("/")[-1].startswith("lora_")}
    assert set(adapted) - added == set(base)
    assert len(added) == 3 * len(
        [la for la in model._flatten_layers() if klp.layers.is_adapted(la)]
    )
    klp.merge_lora_plus(model)
    model.save_weights(tmp_path / "merged.weights.h5")
    assert groups(tmp_path / "merged.weights.h5") == base


def three_equal():
    inputs = keras.Input((FEATURES,))
    x = inputs
    for name in ("one", "two", "three"):
        x = keras.layers.Dense(FEATURES, activation="tanh", name=name)(x)
    return filled(keras.Model(inputs, keras.layers.Dense(CLASSES, name="head")(x)))


@pytest.mark.parametrize("chosen", ["one", "two", "three"])
def test_one_of_three_equal_layers(chosen, tmp_path):
    model = three_equal()
    model.save_weights(tmp_path / "base.weights.h5")
    expected = {
        name: to_numpy(model.get_layer(name).kernel).copy() for name in ("one", "two", "three")
    }
    klp.enable_lora_plus(model, rank=2, targets=[chosen])
    randomize_factors(model)
    outputs = to_numpy(model(features()))
    model.save_weights(tmp_path / "adapted.weights.h5")
    randomize([v for v in model.weights if v.name in ("kernel", "bias")], seed=5)
    model.load_weights(tmp_path / "base.weights.h5")
    for name, value in expected.items():
        np.testing.assert_array_equal(to_numpy(model.get_layer(name).kernel), value)
    twin = three_equal()
    klp.enable_lora_plus(twin, rank=2, targets=[chosen])
    randomize(twin.weights, seed=6)
    twin.load_weights(tmp_path / "adapted.weights.h5")
    np.testing.assert_array_equal(to_numpy(twin(features())), outputs)


@not_fitting
def test_an_adapted_file_is_refused_by_a_plain_model(tmp_path):
    model = three_equal()
    klp.enable_lora_plus(model, rank=2, targets=["two"])
    model.save_weights(tmp_path / "adapted.weights.h5")
    with pytest.raises(ValueError, match="could not be loaded"):
        three_equal().load_weights(tmp_path / "adapted.weights.h5")


@not_fitting
@pytest.mark.parametrize("missing", ["0", "1", "lora_kernel_a", "lora_kernel_b", "lora_scaling"])
def test_a_file_without_a_part_of_a_layer_is_refused(missing, tmp_path):
    model = three_equal()
    klp.enable_lora_plus(model, rank=2, targets=["one"])
    path = tmp_path / "adapted.weights.h5"
    model.save_weights(path)
    name = next(n for n in groups(path) if n.endswith("lora_kernel_a")).replace(
        "lora_kernel_a", missing
    )
    with h5py.File(path, "a") as file:
        del file[name]
    before = snapshot(model.get_layer("one").weights)
    with pytest.raises(ValueError, match="could not be loaded"):
        model.load_weights(path)
    for variable, value in zip(model.get_layer("one").weights, before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)


@not_fitting
def test_another_rank_is_refused(tmp_path):
    model = three_equal()
    klp.enable_lora_plus(model, rank=2)
    model.save_weights(tmp_path / "adapted.weights.h5")
    twin = three_equal()
    klp.enable_lora_plus(twin, rank=3)
    with pytest.raises(ValueError, match="rank"):
        twin.load_weights(tmp_path / "adapted.weights.h5")


def test_layers_stored_by_order_keep_it(tmp_path):
    """Freezing a part of a normalisation layer must not swap gamma and beta in a file."""
    for part in (".*beta", ".*gamma"):
        model = normalised()
        expected = {v.path: to_numpy(v).copy() for v in model.weights}
        klp.enable_lora_plus(model, rank=2, trainable=part)
        model.save_weights(tmp_path / "adapted.weights.h5")
        outputs = to_numpy(model(sequences()))
        twin = normalised()
        klp.enable_lora_plus(twin, rank=2, trainable=part)
        randomize(twin.weights, seed=8)
        twin.load_weights(tmp_path / "adapted.weights.h5")
        for variable in twin.weights:
            if variable.path in expected:
                np.testing.assert_array_equal(to_numpy(variable), expected[variable.path])
        np.testing.assert_array_equal(to_numpy(twin(sequences())), outputs)
        klp.merge_lora_plus(model)
        model.save_weights(tmp_path / "merged.weights.h5")
        plain = normalised()
        randomize(plain.weights, seed=9)
        plain.load_weights(tmp_path / "merged.weights.h5")
        np.testing.assert_array_equal(to_numpy(plain(sequences())), outputs)
