"""K01, K02 and K10: adapter files of models that are alike, but not quite.

K03 is in `tests/enable/test_saving.py` (a) and `tests/enable/test_base_weights.py` (b), P11 in
`tests/resume`.
"""

import keras
import numpy as np
import pytest
from lora_cases import randomize, snapshot
from tiny_models import FEATURES, features, filled
from tolerances import EXACT, FLOAT32, assert_close

import keras_loraplus as klp


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def auto_named(extra=None):
    """Three equal layers with names that Keras numbers; `extra` puts a fourth at that place."""
    layers = [keras.layers.Dense(FEATURES, activation="tanh") for _ in range(3)]
    if extra is not None:
        layers.insert(extra, keras.layers.Dense(FEATURES, activation="tanh"))
    return filled(keras.Sequential([keras.Input((FEATURES,)), *layers, keras.layers.Dense(2)]))


def saved(model, tmp_path):
    """Gives everything that trains values of its own; returns a file and the outputs."""
    randomize(model.trainable_variables, seed=9)
    path = klp.save_adapter(model, str(tmp_path / "a.safetensors"))
    return path, to_numpy(model(features()))


@pytest.mark.parametrize("enabled", [False, True])
def test_k01_automatic_names_do_not_matter(enabled, tmp_path):
    model = auto_named()
    base = to_numpy(model(features()))
    klp.enable_lora_plus(model, rank=2, alpha=5)
    path, outputs = saved(model, tmp_path)
    assert np.abs(outputs - base).max() > 0.1
    twin = auto_named()
    names = [{layer.name for layer in each.layers} for each in (model, twin)]
    assert names[0].isdisjoint(names[1]), "the numbers must differ"
    if enabled:
        klp.enable_lora_plus(twin, rank=2, alpha=5)
    klp.load_adapter(twin, path)
    assert_close(to_numpy(twin(features())), outputs, FLOAT32)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("extra", [0, 1, 2, 3])
def test_k01_one_more_layer_is_an_error_that_names_the_layers(enabled, extra, tmp_path):
    """Structural keys shift by one: the head's place is taken by a layer without its shape."""
    model = auto_named()
    klp.enable_lora_plus(model, rank=2, alpha=5)
    path, _ = saved(model, tmp_path)
    twin = auto_named(extra)
    if enabled:
        klp.enable_lora_plus(twin, rank=2, alpha=5)
    before, classes = snapshot(twin.weights), [type(layer) for layer in twin.layers]
    with pytest.raises(ValueError, match="layers.3"):
        klp.load_adapter(twin, path)
    assert [type(layer) for layer in twin.layers] == classes
    for variable, value in zip(twin.weights, before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value, err_msg=variable.path)


@pytest.mark.parametrize("trainable", [(), ".*bias"])
def test_k02_what_trains_is_what_is_saved(trainable, tmp_path):
    model = auto_named()
    klp.enable_lora_plus(model, rank=2, alpha=5, trainable=trainable)
    path, outputs = saved(model, tmp_path)
    biases = sum(v.name == "bias" for v in model.trainable_variables)
    assert biases == (4 if trainable else 1)
    twin = auto_named()
    klp.load_adapter(twin, path)
    assert_close(to_numpy(twin(features())), outputs, EXACT)
    trained = [len(each.trainable_variables) for each in (model, twin)]
    assert trained[0] == trained[1] == 6 + 1 + biases


CUSTOM = {
    "rank": 2,
    "targets": [".*first", "second"],
    "rank_pattern": {"second": 3},
    "alpha_pattern": {".*first": 7},
    "scaling": "rslora",
    "init": "lora",
    "dropout": 0.2,
    "trainable": ".*head.*",
}


def named():
    inputs = keras.Input((FEATURES,))
    x = inputs
    for name in ("first", "second", "third"):
        x = keras.layers.Dense(FEATURES, activation="tanh", name=name)(x)
    return filled(keras.Model(inputs, keras.layers.Dense(2, name="head")(x)))


def test_k10_the_file_carries_targets_ranks_and_alphas(tmp_path):
    model = named()
    klp.enable_lora_plus(model, **CUSTOM)
    path, outputs = saved(model, tmp_path)
    twin = klp.load_adapter(named(), path)
    assert_close(to_numpy(twin(features())), outputs, EXACT)
    adapters = {la.name: la.adapter for la in twin.layers if klp.layers.is_adapted(la)}
    assert adapters == {la.name: la.adapter for la in model.layers if klp.layers.is_adapted(la)}
    assert {name: (a.rank, a.alpha) for name, a in adapters.items()} == {
        "first": (2, 7),
        "second": (3, 3),
    }
    assert {(a.scaling, a.init, a.dropout) for a in adapters.values()} == {("rslora", "lora", 0.2)}
    assert [v.path for v in twin.trainable_variables] == [v.path for v in model.trainable_variables]


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"rank": 4}, "rank: layers.1 has 2 in the file and 4 here"),
        ({"alpha_pattern": {".*first": 8}}, "alpha: layers.1 has 7 in the file and 8 here"),
        ({"scaling": "standard"}, "scaling: layers.1 has rslora in the file and standard here"),
        ({"targets": [".*first", "second", "third"]}, "missing: layers.3/lora_kernel_a"),
        ({"targets": ["first"], "rank_pattern": None}, "unexpected: layers.2/lora_kernel_a"),
        ({"trainable": ()}, "unexpected: layers.4/bias"),
    ],
)
def test_k10_a_mismatch_is_an_error(change, fault, tmp_path):
    model = named()
    klp.enable_lora_plus(model, **CUSTOM)
    path, _ = saved(model, tmp_path)
    twin = named()
    klp.enable_lora_plus(twin, **{**CUSTOM, **change})
    before = snapshot(twin.weights)
    with pytest.raises(ValueError, match=fault):
        klp.load_adapter(twin, path)
    for variable, value in zip(twin.weights, before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value, err_msg=variable.path)
