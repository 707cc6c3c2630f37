"""The pure part: paths and settings in, a table out."""

import numpy as np
import pytest
from optimizer_cases import PATHS

from keras_loraplus.optimizers.multipliers import (
    Settings,
    plan_from_record,
    plan_multipliers,
    role_of,
)


def values(settings, paths=PATHS):
    return [row.value for row in plan_multipliers(paths, settings)]


def test_the_documented_table():
    table = plan_multipliers(PATHS, Settings(lr_ratio=16, embedding_lr_multiplier=0.5))
    assert [(row.role, row.value) for row in table] == [
        ("lora_a", 1.0),
        ("lora_b", 16.0),
        ("embedding_a", 0.5),
        ("embedding_b", 8.0),
        ("other", 1.0),
        ("other", 1.0),
    ]


@pytest.mark.parametrize(
    "path",
    [
        "lora_kernel_b_head/kernel",
        "lora_kernel_b/bias",
        "weighted_avg/weighted_avg_b",
        "head/my_lora_kernel_b",
        "head/lora_kernel_b_average",
        "lora_b",
    ],
)
def test_only_the_last_path_component_decides(path):
    assert role_of(path) == "other"


def test_a_pattern_multiplies_the_role():
    settings = Settings(lr_ratio=4, lr_multipliers={"head/.*": 8.0, ".*query/lora_kernel_b": 2})
    assert values(settings) == [1.0, 8.0, 1.0, 4.0, 8.0, 8.0]


def test_a_pattern_must_match_the_whole_path():
    with pytest.raises(ValueError, match="Keys that match none") as error:
        values(Settings(lr_multipliers={"head": 8.0}))
    assert "'head'" in str(error.value)
    assert "'head/kernel'" in str(error.value)


def test_an_exact_path_takes_precedence_over_patterns():
    settings = Settings(lr_multipliers={"head/.*": 8.0, "head/bias": 3.0})
    assert values(settings)[-2:] == [8.0, 3.0]


def test_an_exact_path_with_special_characters():
    paths = ["a+b/kernel", "aab/kernel"]
    # As a pattern "a+b/kernel" matches the second path only.
    assert values(Settings(lr_multipliers={"a+b/kernel": 5.0}), paths) == [5.0, 5.0]
    assert values(Settings(lr_multipliers={r"a\+b/kernel": 5.0}), paths) == [5.0, 1.0]


def test_two_patterns_on_one_variable_are_an_error_that_names_all():
    with pytest.raises(ValueError) as error:
        values(Settings(lr_multipliers={"head/.*": 8.0, ".*/bias": 2.0}))
    for name in ("head/.*", ".*/bias", "head/bias"):
        assert repr(name) in str(error.value)


def test_every_unused_pattern_is_named():
    with pytest.raises(ValueError) as error:
        values(Settings(lr_multipliers={"haed/.*": 8.0, "head/.*": 2.0, "nothing": 1.0}))
    assert "['haed/.*', 'nothing']" in str(error.value)


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), True, "16", None, 1j])
@pytest.mark.parametrize("argument", ["lr_ratio", "embedding_lr_multiplier", "factor"])
def test_bad_numbers(argument, bad):
    arguments = {"lr_multipliers": {"x": bad}} if argument == "factor" else {argument: bad}
    with pytest.raises(ValueError, match="positive, finite number"):
        Settings(**arguments)


@pytest.mark.parametrize("good", [1, 16, 0.25, np.float32(2), np.int64(3)])
def test_good_numbers_become_floats(good):
    assert type(Settings(lr_ratio=good).lr_ratio) is float


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({3: 1.0}, "must be strings"),
        ({"(": 1.0}, "not a regular expression"),
        ([("a", 1.0)], "must be a dictionary"),
        ("head", "must be a dictionary"),
    ],
)
def test_bad_patterns(bad, message):
    with pytest.raises(ValueError, match=message):
        Settings(lr_multipliers=bad)


def test_a_record_assigns_by_position_what_was_renamed():
    settings = Settings(lr_ratio=4, lr_multipliers={"m/head/.*": 8.0})
    record = [
        {"path": "m/q/lora_kernel_b", "shape": [2, 5], "pattern": None},
        {"path": "m/head/kernel", "shape": [5, 3], "pattern": "m/head/.*"},
    ]
    paths, shapes = ["q/lora_kernel_b", "head/kernel"], [(2, 5), (5, 3)]
    table = plan_from_record(record, paths, shapes, settings)
    assert [(row.path, row.value) for row in table] == [
        ("q/lora_kernel_b", 4.0),
        ("head/kernel", 8.0),
    ]
    # Anything that is not the same model falls back to the patterns.
    assert plan_from_record(None, paths, shapes, settings) is None
    assert plan_from_record(record, paths[:1], shapes[:1], settings) is None
    assert plan_from_record(record, ["q/lora_kernel_b", "head/bias"], shapes, settings) is None
    assert plan_from_record(record, paths, [(2, 5), (5, 4)], settings) is None
