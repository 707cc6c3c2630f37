"""Axes in, cells out."""

import keras
import optuna
import pytest
import tiny_models

import keras_loraplus as klp
from keras_loraplus.tuning.cells import Cell, plan_axes

DEFAULTS = {
    "eta_a": [1e-4, 1e-3],
    "eta_b": None,
    "lr_ratio": None,
    "head_rate": None,
    "head_ratio": None,
    "lora": True,
    "full": None,
}


def plan(**given):
    return {axes.arm: axes for axes in plan_axes(**{**DEFAULTS, **given})}


def rates(axes):
    return [axes.cell(point, 0).rates for point in axes.points()]


def test_a_grid_over_both_rates():
    axes = plan(eta_b=[1e-3, 1e-2, 1e-1])
    assert rates(axes["loraplus"]) == [
        (a, b, None) for a in (1e-4, 1e-3) for b in (1e-3, 1e-2, 1e-1)
    ]
    lora = rates(axes["lora"])
    assert all(a == b for a, b, _ in lora)
    found = [a for a, _, _ in lora]
    # As many, from the lowest to the highest rate of either side, evenly in the logarithm.
    assert found == pytest.approx([1e-4 * 10 ** (3 * i / 5) for i in range(6)], rel=1e-5)


def test_fixed_ratios_and_a_head_that_is_a_multiple():
    axes = plan(lr_ratio=[4, 16], head_ratio=[1.0, 8.0])
    assert rates(axes["loraplus"])[:4] == [
        (1e-4, pytest.approx(4e-4), 1e-4),
        (1e-4, pytest.approx(4e-4), pytest.approx(8e-4)),
        (1e-4, pytest.approx(1.6e-3), 1e-4),
        (1e-4, pytest.approx(1.6e-3), pytest.approx(8e-4)),
    ]
    assert len(rates(axes["lora"])) == len(rates(axes["loraplus"])) == 8
    low, *_, high = sorted({a for a, _, _ in rates(axes["lora"])})
    assert (low, high) == (1e-4, pytest.approx(1.6e-2))


def test_a_constant_head_rate_is_the_same_in_every_arm():
    axes = plan(lr_ratio=8.0, head_rate=5e-3, full={"eta_a": [1e-5]})
    heads = {arm: {head for _, _, head in rates(part)} for arm, part in axes.items()}
    assert heads == dict.fromkeys(("loraplus", "lora", "full"), {5e-3})
    assert rates(axes["full"]) == [(1e-5, None, 5e-3)]


def test_an_arm_may_have_axes_of_its_own():
    axes = plan(
        lr_ratio=[8.0, 16.0],
        head_ratio=[8.0, 16.0],
        lora={"eta_a": [1e-3, 4e-3], "head_ratio": [1.0, 2.0, 4.0, 8.0]},
    )
    assert rates(axes["lora"])[3] == (1e-3, 1e-3, 8e-3)
    assert "lora" not in plan(lr_ratio=8.0, lora=False)


def test_distributions():
    distribution = optuna.distributions.FloatDistribution
    axes = plan(eta_a=distribution(1e-5, 1e-3, log=True), lr_ratio=distribution(1, 32, log=True))
    assert not axes["loraplus"].is_grid()
    lora = axes["lora"].eta_a
    assert (lora.low, lora.high, lora.log) == (1e-5, 1e-3 * 32, True)


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "either as `eta_b`"),
        ({"eta_b": 1e-3, "lr_ratio": 2}, "either as `eta_b`"),
        ({"lr_ratio": 2, "head_rate": 1e-3, "head_ratio": 2}, "either as `head_rate`"),
        ({"lr_ratio": []}, "`lr_ratio` must be"),
        ({"lr_ratio": [1, 1]}, "list of different ones"),
        ({"lr_ratio": [True]}, "`lr_ratio` must be"),
        ({"lr_ratio": float("nan")}, "`lr_ratio` must be"),
        ({"lr_ratio": -1}, "`lr_ratio` must be"),
        ({"lr_ratio": "16"}, "`lr_ratio` must be"),
        ({"lr_ratio": 2, "lora": {"eta_a": [1e-3]}}, "as many cells as LoRA"),
        ({"lr_ratio": 2, "lora": {"rate": [1e-3]}}, "'eta_a'"),
        ({"lr_ratio": 2, "lora": 3}, "`lora` must be"),
        ({"lr_ratio": 2, "full": {}}, "`full` must be"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message):
        plan(**given)


def rates_in(optimizer, model):
    optimizer.build(model.trainable_variables)
    return {row.path: row.learning_rate for row in optimizer.assignments()}


def test_the_optimizer_has_the_rates_of_the_cell():
    model = tiny_models.functional()
    klp.enable_lora_plus(model, rank=2)
    found = rates_in(Cell("loraplus", 1e-3, 8e-3, 2e-3, 0).optimizer(model), model)
    assert found == {
        path: pytest.approx({"a": 1e-3, "b": 8e-3}.get(path[-1] if "lora" in path else "", 2e-3))
        for path in found
    }
    assert {path for path in found if path.startswith("head/")} == {"head/kernel", "head/bias"}


def test_a_head_of_full_fine_tuning_is_named_by_a_pattern():
    model = tiny_models.functional()
    cell = Cell("full", 1e-4, None, 1e-2, 0)
    found = rates_in(cell.optimizer(model, head="head/.*"), model)
    assert found["first/kernel"] == pytest.approx(1e-4)
    assert found["head/bias"] == pytest.approx(1e-2)
    with pytest.raises(ValueError, match="Name it by a regular expression"):
        cell.optimizer(model)


def test_a_head_without_a_rate_is_refused():
    model = tiny_models.functional()
    klp.enable_lora_plus(model, rank=2)
    with pytest.raises(ValueError, match="'head/kernel', 'head/bias'"):
        Cell("loraplus", 1e-3, 8e-3, None, 0).optimizer(model)


def test_a_schedule_begins_at_the_rate():
    model = tiny_models.functional()
    klp.enable_lora_plus(model, rank=2)
    decay = keras.optimizers.schedules.PolynomialDecay
    cell = Cell("loraplus", 1e-3, 8e-3, 2e-3, 0)
    optimizer = cell.optimizer(model, schedule=lambda rate: decay(rate, 10, 0.0))
    assert rates_in(optimizer, model)["head/bias"] == pytest.approx(2e-3)
