"""Which layers are adapted, with which settings, and what the report says (K09, K22)."""

import keras
import numpy as np
import pytest
from lora_cases import snapshot
from tiny_models import MODELS, compile_model, features, filled, functional, normalised, text

import keras_loraplus as klp


def adapted_names(model):
    return [la.name for la in model._flatten_layers() if klp.layers.is_adapted(la)]


ADAPTED = {
    "functional": {"first", "second"},
    "sequential": {"first", "second"},
    "subclassed": {"first", "second"},
    "nested": {"first", "second"},
    "normalised": {"conv", "hidden"},
    "text": {"table", "query", "key", "value", "attention_output", "hidden"},
}


@pytest.mark.parametrize("name", MODELS)
def test_default_targets_leave_the_head(name):
    """K22: the output layer stays trainable and unadapted."""
    model = MODELS[name][0]()
    report = klp.enable_lora_plus(model, rank=2)
    assert set(adapted_names(model)) == ADAPTED[name]
    assert len(report.heads) == 1 and report.heads[0].endswith("head")
    head = next(la for la in model._flatten_layers() if la.name == "head")
    assert type(head) is keras.layers.Dense
    assert [v.name for v in head.trainable_variables] == ["kernel", "bias"]


def test_several_outputs_have_several_heads():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, name="hidden")(inputs)
    left = keras.layers.Activation("relu")(keras.layers.Dense(2, name="left")(x))
    right = keras.layers.Dense(3, name="right")(x) * 2.0
    model = keras.Model(inputs, {"a": left, "b": [right, x]})
    # The hidden layer is an output as well: nothing is left to adapt.
    with pytest.raises(ValueError, match="can be adapted"):
        klp.enable_lora_plus(model, rank=2)
    model = keras.Model(inputs, [left, right])
    report = klp.enable_lora_plus(model, rank=2)
    assert set(report.heads) == {"left", "right"}
    assert adapted_names(model) == ["hidden"]


def test_all_linear_leaves_out_embeddings_and_convolutions():
    model = text()
    klp.enable_lora_plus(model, rank=2, targets="all-linear")
    assert set(adapted_names(model)) == ADAPTED["text"] - {"table"}
    model = normalised()
    klp.enable_lora_plus(model, rank=2, targets="all-linear")
    assert adapted_names(model) == ["hidden"]


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["first"], {"first"}),
        (["first", "head"], {"first", "head"}),
        ("second", {"second"}),
        ([".*s.*"], {"first", "second"}),
        (("first", "sec.*"), {"first", "second"}),
    ],
)
def test_names_and_regexes(targets, expected):
    model = functional()
    klp.enable_lora_plus(model, rank=2, targets=targets)
    assert set(adapted_names(model)) == expected


def test_a_regex_must_match_the_whole_path():
    model = text()
    klp.enable_lora_plus(model, rank=2, targets=[".*/query", "attention/value"])
    assert set(adapted_names(model)) == {"query", "value"}
    with pytest.raises(ValueError, match="matched no layer"):
        klp.enable_lora_plus(text(), rank=2, targets=["quer"])


def test_excluded_layers_are_frozen_and_plain():
    model = text()
    klp.enable_lora_plus(model, rank=2, exclude=[".*/(key|query)", "table"])
    assert set(adapted_names(model)) == {"value", "attention_output", "hidden"}
    assert not any("table" in v.path or "query" in v.path for v in model.trainable_variables)


def test_patterns_for_rank_and_alpha():
    model = text()
    report = klp.enable_lora_plus(
        model, rank=2, alpha=6, rank_pattern={".*/query": 3, "table": 1}, alpha_pattern={"table": 5}
    )
    settings = {layer.path: (layer.rank, layer.alpha) for layer in report.adapted}
    assert settings["attention/query"] == (3, 6)
    assert settings["table"] == (1, 5)
    assert settings["hidden"] == (2, 6)
    layers = {la.path: la for la in model._flatten_layers()}
    assert layers["table"].adapter.scale == 5.0
    assert tuple(layers["attention/query"].lora_kernel_a.shape) == (8, 3)


def test_trainable_keeps_variables_by_regex():
    model = normalised()
    klp.enable_lora_plus(model, rank=2, trainable=["layer_norm/.*", ".*/bias"])
    kept = {v.path for v in model.trainable_variables if "lora" not in v.path}
    assert kept == {
        "layer_norm/gamma",
        "layer_norm/beta",
        "conv/bias",
        "hidden/bias",
        "head/kernel",
        "head/bias",
    }


def test_alpha_none_means_each_layers_rank():
    model = functional()
    klp.enable_lora_plus(model, rank=2, rank_pattern={"first": 4})
    assert [model.get_layer(n).adapter.scale for n in ("first", "second")] == [1.0, 1.0]


def test_the_report_counts_and_prints():
    model = text()
    plain = model.count_params()
    report = klp.enable_lora_plus(model, rank=2, alpha=4)
    trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    # Two factors a layer of 8 x 8 features (the table 17 x 8), and the head.
    assert trained == 5 * 2 * (8 + 8) + 2 * (17 + 8) + (8 * 3 + 3)
    assert report.trainable_parameters == trained
    added = trained - (8 * 3 + 3)
    scales = 6
    assert report.total_parameters == plain + added + scales
    assert set(report.trainable) == {v.path for v in model.trainable_variables}
    printed = str(report)
    for layer in report.adapted:
        assert layer.path in printed
    assert "17 x 2" in printed and "2 x 8" in printed
    assert f"{trained:,} of" in printed
    assert "left trainable and unadapted: head" in printed


def recurrent():
    inputs = keras.Input((5, 6))
    x = keras.layers.Dense(8, name="hidden")(inputs)
    x = keras.layers.LSTM(8, name="recurrent")(x)
    return filled(keras.Model(inputs, keras.layers.Dense(3, name="head")(x)))


def test_what_cannot_be_adapted_is_reported():
    report = klp.enable_lora_plus(recurrent(), rank=2)
    assert [layer.path for layer in report.adapted] == ["hidden"]
    reasons = dict(report.skipped)
    assert any("recurrent" in path for path in reasons)
    assert "not adaptable: " in str(report)
    with pytest.raises(ValueError, match="cannot be adapted"):
        klp.enable_lora_plus(recurrent(), rank=2, targets=["hidden", "recurrent.*"])


def state(model):
    """Returns all that a refused call must leave alone."""
    return [
        (type(la), la.trainable, sorted(vars(la)), [(v.path, v.trainable) for v in la.weights])
        for la in model._flatten_layers()
    ]


BAD = {
    "a target without a match": ({"targets": ["first", "frist"]}, "frist"),
    "no targets": ({"targets": []}, "matched no layer"),
    "a bad regex": ({"targets": ["(first"]}, "regular expressions"),
    "a target that is no text": ({"targets": [3]}, "regular expressions"),
    "exclude without a match": ({"exclude": ["thrid"]}, "thrid"),
    "everything excluded": ({"exclude": [".*"]}, "can be adapted"),
    "rank_pattern without a match": ({"rank_pattern": {"frist": 2}}, "frist"),
    "alpha_pattern without a match": ({"alpha_pattern": {"frist": 2}}, "frist"),
    "two patterns on one layer": ({"rank_pattern": {"first": 2, "f.*": 3}}, "two patterns"),
    "a bad rank in a pattern": ({"rank_pattern": {"first": 0}}, "rank"),
    "a bad alpha in a pattern": ({"alpha_pattern": {"first": -1}}, "alpha"),
    "trainable without a match": ({"trainable": ["frist/.*"]}, "frist"),
    "trainable kernel of an adapted layer": ({"trainable": ["first/kernel"]}, "first/kernel"),
    "rank True": ({"rank": True}, "rank=True"),
    "rank 0": ({"rank": 0}, "rank=0"),
    "rank -1": ({"rank": -1}, "rank=-1"),
    "rank 2.0": ({"rank": 2.0}, "rank=2.0"),
    "rank text": ({"rank": "8"}, "rank='8'"),
    "rank None": ({"rank": None}, "rank=None"),
    "alpha 0": ({"alpha": 0}, "alpha=0"),
    "alpha True": ({"alpha": True}, "alpha=True"),
    "alpha nan": ({"alpha": float("nan")}, "alpha=nan"),
    "init": ({"init": "gaussian"}, "gaussian"),
    "init of two zeros": ({"init": ("zeros", "zeros")}, "both are zeros"),
    "init without zeros": ({"init": ("ones", "ones")}, "neither is zeros"),
    "scaling": ({"scaling": "sqrt"}, "sqrt"),
    "dropout 1": ({"dropout": 1.0}, "dropout=1.0"),
    "dropout -0.1": ({"dropout": -0.1}, "dropout=-0.1"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_and_change_nothing(arguments, message):
    """K09, K14, rule 11."""
    model = functional()
    compile_model(model)
    outputs = model.predict(features(), verbose=0)
    before, values = state(model), snapshot(model.weights)
    with pytest.raises(ValueError) as error:
        klp.enable_lora_plus(model, **arguments)
    assert message in str(error.value)
    assert state(model) == before
    assert model.compiled
    for variable, value in zip(model.weights, values, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    np.testing.assert_array_equal(model.predict(features(), verbose=0), outputs)
    assert klp.enable_lora_plus(model, rank=2).adapted


def test_a_target_without_a_match_lists_what_could_match():
    with pytest.raises(ValueError) as error:
        klp.enable_lora_plus(text(), targets=["quary"])
    message = str(error.value)
    assert "['quary']" in message
    for path in ("attention/query", "attention/value", "hidden"):
        assert path in message


def test_a_rank_above_both_sides_warns():
    model = functional()
    with pytest.warns(UserWarning, match="rank"):
        klp.enable_lora_plus(model, rank=9, targets=["second"])
    assert tuple(model.get_layer("second").lora_kernel_a.shape) == (8, 9)
