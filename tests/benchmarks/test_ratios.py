"""The arithmetic of the benchmark's report; the arms themselves run in `make bench`."""

import keras
import pytest

from benchmarks.__main__ import BOUNDS, as_markdown, ratios, spread
from benchmarks.cases import CASES


def test_a_ratio_is_formed_within_each_round():
    # The machine is twice as slow in the second round: the ratio does not see it.
    seconds = {("torch", "ours"): [3.0, 6.0, 3.0], ("torch", "torch_fused"): [2.0, 4.0, 2.0]}
    (row,) = ratios("optimizer_step", seconds)
    assert (row["backend"], row["reference"]) == ("torch", "torch_fused (torch)")
    assert (row["ratio"], row["spread"], row["bound"]) == (1.5, 0.0, 1.5)


def test_arms_of_two_backends_are_compared():
    seconds = {("jax", "ours"): [1.0] * 3, ("torch", "peft"): [2.0, 1.0, 2.0]}
    (row,) = ratios("bert_wide", seconds)
    assert row["reference"] == "peft (torch)" and row["ratio"] == 0.5 and row["spread"] > 0


def test_spread_is_the_interquartile_range_over_the_median():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == pytest.approx((6 - 2) / 4)


def test_a_bound_that_is_not_met_is_said():
    row = {"case": "c", "backend": "b", "reference": "r", "spread": 0.05, "bound": 1.0}
    table = as_markdown({"ratios": [{**row, "ratio": 1.01}, {**row, "ratio": 1.0}]})
    assert table.splitlines()[-2:] == [
        "| c | b | r | 1.01 | 5 % | 1.00 (not met) |",
        "| c | b | r | 1.00 | 5 % | 1.00 |",
    ]


def test_the_arms_of_the_small_case_do_a_step(backend):
    assert {case for case, *_ in BOUNDS} == set(CASES)
    arms = CASES["optimizer_step"]()
    step = arms["ours"]()
    step()
    assert set(arms) == {"ours", "stock"} | ({"torch_fused"} if backend == "torch" else set())
    assert keras.backend.backend() == backend
