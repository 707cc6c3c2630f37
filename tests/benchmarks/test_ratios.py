"""The arithmetic of the benchmark's report; the arms themselves run in `make bench`."""

import keras
import pytest

from benchmarks import readme
from benchmarks.cases import CASES
from benchmarks.contract import BOUNDS, as_markdown, ratios
from benchmarks.names import CONTRACT_CASES
from benchmarks.report import as_markdown as as_page
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


def test_the_readme_says_what_the_committed_results_say():
    results = readme.read()
    text = readme.README.read_text()
    assert readme.into_readme(text, results) == text
    assert as_markdown(results[readme.CONTRACT]) in text
    for name, result in results.items():
        page = (readme.RESULTS / f"{name}.md").read_text()
        if name == readme.CONTRACT:
            assert page == as_markdown(result)
        else:
            assert page == as_page(name.partition("_gpu_")[0], result)
            assert f"(benchmarks/results/{name}.md)" in text


def test_the_readme_has_the_sums_of_operations_once_they_are_measured():
    ratios = {"date": "2026-01-01", "machine": "m", "blocks": 9, "ratios": []}
    rows = [
        {"case": "a", "milliseconds": {"ours": 1.2, "peft": 4.0}},
        {"case": "b", "milliseconds": {"ours": 9.0, "peft": 8.0}},
        {"case": "a", "milliseconds": {"ours": 2.5, "peft": 1.0}},
    ]
    rate = {"flops": 3e8, "flops_per_second": 2e11}
    floors = [{"case": case, **rate} for case in "ab"]
    profile = {"date": "2026-01-02", "profile": rows, "floors": floors}
    text = readme.into_readme(readme.BEGIN + readme.END, {"ratios": ratios, "profile": profile})
    assert "2026-01-02: a: ours 4 ms, PEFT 5 ms; b: ours 9 ms, PEFT 8 ms (" in text
    assert "b: at 200 GFLOP/s" in text and "0.3 GFLOP of PEFT's products take 2 ms, 0.19 of" in text


def test_the_readme_has_each_part_once_it_is_measured():
    ratios = {"date": "2026-01-01", "machine": "m", "blocks": 9, "ratios": []}
    memory = [
        {"case": case, "backend": "torch", "arm": arm, "extra": extra * 1_000_000}
        for case, arm, extra in (("minilm_qv", "ours", 30), ("minilm_qv", "peft", 40))
    ] + [{"case": "vit", "backend": "jax", "arm": "ours", "extra": 7_000_000}]
    recomputed = [
        {"backend": "torch", "arm": arm, "milliseconds": ms, "extra": 1_000_000 * extra}
        for arm, ms, extra in (("none", 380.4, 190), ("blocks_unfiltered", 620.6, 72))
    ]
    cost = {"seconds": 1.26, "extra_bytes": 33_000_000}
    large = {
        "backend": "torch",
        "parameters": 1_034_000_000,
        "base_bytes": 2_069_000_000,
        "adapter_bytes": 26_000_000,
        "enable": cost,
        "merge": {"seconds": 9.0, "extra_bytes": 505_000_000},
    }
    text = f"before\n{readme.BEGIN}old\n{readme.END}\nafter\n"
    results = {"ratios": ratios}
    plain = readme.into_readme(text, results)
    assert "old" not in plain and plain.startswith("before\n") and plain.endswith("\nafter\n")
    results |= {"memory": {"date": "2026-01-02", "memory": memory}, "large": {"large": [large]}}
    results["checkpointing"] = {"date": "2026-01-03", "checkpointing": recomputed}
    full = readme.into_readme(plain, results)
    assert "| minilm_qv | torch |  |  |  | 30 |  | 40 |\n" in full and "vit" not in full
    assert "measured 2026-01-03:" in full
    assert "| torch | 380 ms, 190 MB |  |  | 621 ms, 72 MB |\n" in full
    assert "`enable_lora_plus` takes 1.3 s and 33 MB on torch; " in full
    assert "`merge_lora_plus` 9.0 s and 505 MB on torch.\n" in full
    assert "[memory](benchmarks/results/memory.md)" in full
    assert readme.into_readme(full, {"ratios": ratios}) == plain


def test_the_arms_of_the_small_case_do_a_step(backend):
    assert {case for case, *_ in BOUNDS} == set(CONTRACT_CASES) <= set(CASES)
    arms = CASES["optimizer_step"]()
    step = arms["ours"]()
    step()
    assert set(arms) == {"ours", "stock"} | ({"torch_fused"} if backend == "torch" else set())
    assert keras.backend.backend() == backend
