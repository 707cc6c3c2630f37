"""What `suggest` makes of a rate of plain LoRA, and of a sweep."""

import dataclasses

import keras
import pytest

import keras_loraplus as klp
from keras_loraplus.tuning import SweepResult, suggest


def record(arm, eta_a, eta_b, value, seed=0, status="complete"):
    rates = {"eta_a": eta_a, "eta_b": eta_b, "lr_ratio": eta_b / eta_a, "head_rate": 5e-3}
    result = {"status": status, "value": value, "metrics": {}, "error": None}
    return {"arm": arm, **rates, "seed": seed, **result}


def result(records, mode="max", about=None, missing=0):
    seeds = sorted({r["seed"] for r in records})
    axes = {
        "loraplus": {"eta_a": [1e-4, 1e-3, 1e-2], "eta_b": [1e-3, 1e-2, 1e-1]},
        "lora": {"eta_a": [1e-3, 1e-2]},
    }
    budget = {"loraplus": 9, "lora": 9}
    setup = {"about": about or {}}
    return SweepResult("accuracy", mode, seeds, axes, budget, records, setup=setup, missing=missing)


def two_arms(plus, plain, mode="max", **more):
    """Two cells an arm, the better one first; a value a seed."""
    worse = -0.2 if mode == "max" else 0.2
    records = []
    for arm, values, rates in (("loraplus", plus, (1e-3, 1e-2)), ("lora", plain, (4e-3, 4e-3))):
        for seed, value in enumerate(values):
            records.append(record(arm, *rates, value, seed))
            records.append(record(arm, *(2 * rate for rate in rates), value + worse, seed))
    return result(records, mode, **more)


@pytest.mark.parametrize(
    ("given", "ratio", "init"),
    [
        ({}, 16, "loraplus"),
        ({"hard_task": True}, 16, "loraplus"),
        ({"model_family": "roberta"}, 16, "loraplus"),
        ({"model_family": "roberta", "init": "lora"}, 4, "lora"),
        ({"model_family": "roberta", "init": "lora", "hard_task": True}, 8, "lora"),
        ({"init": "lora"}, 4, "lora"),
        ({"model_family": "llama"}, 2, "loraplus"),
        ({"model_family": "llama", "init": "lora", "hard_task": True}, 4, "lora"),
        ({"hard_task": False}, 1, "lora"),
    ],
)
def test_the_rate_of_plain_lora_becomes_that_of_b(given, ratio, init):
    found = suggest(lora_rate=2e-3, **given)
    assert (found.lr_ratio, found.init) == (ratio, init)
    assert found.eta_a == pytest.approx(2e-3 / ratio) and found.eta_b == pytest.approx(2e-3)
    assert found.head_rate == 2e-3
    assert "no gain" in found.caution or "not expect a gain" in found.caution
    assert found.lora_as_good is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.eta_a = 1.0


def test_what_is_printed_names_rates_evidence_and_limits():
    found = suggest(lora_rate=2e-3, model_family="llama", head_rate=1e-2)
    lines = str(found).splitlines()
    assert lines[0] == (
        "eta_A 0.001 (learning_rate), ratio 2, so eta_B 0.002; init: 'loraplus'; rate of the "
        "head: 0.01"
    )
    assert "Llama-7b" in lines[1] and "not known to hold" in lines[1]
    assert "eta_A = 0.002 / 2" in lines[2]
    assert "easy" in lines[-1]


def test_a_sweep_that_lora_plus_won():
    found = suggest(two_arms([0.90, 0.91], [0.80, 0.81], about={"init": "lora"}, missing=3))
    assert (found.eta_a, found.lr_ratio, found.init) == (1e-3, pytest.approx(10.0), "lora")
    assert found.head_rate == 5e-3
    assert found.lora_as_good is False and "better than tuned plain LoRA" in found.caution
    text = str(found)
    assert "accuracy 0.905" in text and "0.805 at a rate of 0.004" in text and "2 seeds" in text
    assert "3 trials" in text and "on the edge" not in text


def test_a_best_cell_on_the_edge_is_said_to_be():
    found = suggest(result([record("loraplus", 1e-3, 1e-1, 0.9), record("lora", 1e-3, 1e-3, 0.5)]))
    assert "on the edge of eta_b: look further" in str(found)


@pytest.mark.parametrize(
    ("plus", "plain", "mode", "rates"),
    [
        # Within the spread of the seeds: the better one, and it says that they are alike.
        ([0.90, 0.94], [0.89, 0.93], "max", (1e-3, 10.0)),
        ([0.90, 0.90], [0.90, 0.90], "max", (4e-3, 1.0)),
        ([0.80, 0.80], [0.90, 0.90], "max", (4e-3, 1.0)),
        ([0.40, 0.40], [0.30, 0.30], "min", (4e-3, 1.0)),
        # One seed: one per cent.
        ([0.905], [0.90], "max", (1e-3, 10.0)),
    ],
)
def test_plain_lora_that_is_as_good_is_said_to_be(plus, plain, mode, rates):
    found = suggest(two_arms(plus, plain, mode))
    assert (found.eta_a, found.lr_ratio) == pytest.approx(rates)
    assert found.lora_as_good is True
    assert "Expect no gain" in str(found) and "as good" in str(found)
    assert found.init is None and "does not record it" in str(found)


def test_less_is_better_where_the_sweep_says_so():
    found = suggest(two_arms([0.30, 0.31], [0.40, 0.41], "min"), init="loraplus")
    assert found.lora_as_good is False and found.eta_a == 1e-3 and found.init == "loraplus"


def test_one_arm_alone_says_nothing_about_a_gain():
    found = suggest(result([record("loraplus", 1e-3, 1e-2, 0.9)]))
    assert found.lora_as_good is None and "not known" in found.caution
    assert "on the edge" not in str(found)
    found = suggest(result([record("lora", 4e-3, 4e-3, 0.9)]))
    assert found.lr_ratio == 1.0 and "no finished LoRA+" in found.caution


@pytest.mark.parametrize("adapted_only", [False, True])
def test_the_optimizer_has_the_suggested_rates(adapted_only):
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, name="in"), keras.layers.Dense(2, name="top")]
    )
    targets = ["in", "top"] if adapted_only else None
    klp.enable_lora_plus(model, rank=2, targets=targets)
    optimizer = suggest(lora_rate=1.6e-3).optimizer(model, weight_decay=0.0)
    optimizer.build(model.trainable_variables)
    rates = {(row.role, round(row.learning_rate, 8)) for row in optimizer.assignments()}
    expected = {("lora_a", 1e-4), ("lora_b", 1.6e-3)}
    assert rates == (expected if adapted_only else expected | {("other", 1.6e-3)})


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        ((), {}, "either the result of a sweep or `lora_rate`"),
        ((2e-3,), {}, "a rate goes by name"),
        ((), {"lora_rate": -1.0}, "`lora_rate` must be a positive number"),
        ((), {"lora_rate": True}, "`lora_rate` must be a positive number"),
        ((), {"lora_rate": 1e-3, "head_rate": 0}, "`head_rate` must be"),
        ((), {"lora_rate": 1e-3, "model_family": "gpt"}, "families.*llama.*roberta"),
        ((), {"lora_rate": 1e-3, "init": "zeros"}, "`init` must be"),
        ((), {"lora_rate": 1e-3, "hard_task": "yes"}, "`hard_task` must be"),
        ((two_arms([1.0], [1.0]),), {"hard_task": True}, "hard_task: only with `lora_rate`"),
        ((two_arms([1.0], [1.0], about={"init": "lora"}),), {"init": "loraplus"}, "carry over"),
        ((result([record("lora", 1e-3, 1e-3, None, status="failed")]),), {}, "no cell"),
    ],
)
def test_what_is_wrong_is_said(arguments, given, message):
    with pytest.raises(ValueError, match=message):
        suggest(*arguments, **given)


def test_a_sweep_that_learnt_nothing_says_so():
    learnt = two_arms([0.42], [0.42], about={"most_frequent_class": 0.41})
    assert suggest(learnt).lora_as_good is True
    nothing = two_arms([0.42], [0.42], about={"most_frequent_class": 0.42})
    found = suggest(nothing)
    assert (
        found.lora_as_good is None
        and "the most frequent class alone makes up 0.42" in found.caution
    )
