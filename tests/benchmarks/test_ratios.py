"""The arithmetic of the benchmark's report; the arms themselves run in `make bench`."""

import json

import keras
import pytest

from benchmarks.__main__ import README, RESULTS
from benchmarks.cases import CASES
from benchmarks.contract import BOUNDS, as_markdown, into_readme, ratios
from benchmarks.names import CONTRACT_CASES
from benchmarks.rounds import spread


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
    rows = [{**row, "ratio": 1.01, "frozen": 0.97}, {**row, "ratio": 1.0, "frozen": None}]
    assert as_markdown({"ratios": rows}).splitlines()[-2:] == [
        "| c | b | r | 1.01 | 5 % | 0.97 | 1.00 (not met) |",
        "| c | b | r | 1.00 | 5 % |  | 1.00 |",
    ]


def test_the_frozen_models_ratio_stands_beside_ours():
    arms = {"ours": [1.1] * 3, "native": [2.0] * 3, "limit": [1.0] * 3}
    seconds = {("jax", arm): values for arm, values in arms.items()}
    found = {row["reference"]: row["frozen"] for row in ratios("bert_wide", seconds)}
    assert found == {"native (jax)": 0.5, "limit (jax)": None}


def test_the_readmes_table_is_that_of_the_committed_results():
    result = json.loads((RESULTS / "ratios.json").read_text())
    assert into_readme(README.read_text(), result) == README.read_text()
    assert as_markdown(result) in README.read_text()
    assert (RESULTS / "ratios.md").read_text() == as_markdown(result)


def test_the_arms_of_the_small_case_do_a_step(backend):
    assert {case for case, *_ in BOUNDS} == set(CONTRACT_CASES) <= set(CASES)
    arms = CASES["optimizer_step"]()
    step = arms["ours"]()
    step()
    assert set(arms) == {"ours", "stock"} | ({"torch_fused"} if backend == "torch" else set())
    assert keras.backend.backend() == backend
