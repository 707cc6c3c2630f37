"""A step's operations on torch: their order, their page, and a tiny model's."""

import argparse
import importlib.metadata
import itertools

import pytest

from benchmarks import parts, profiling, report

TIMES = {
    "ours": [{"mm": 5.0, "add": 1.0}, {"mm": 7.0, "add": 1.0}, {"mm": 6.0}],
    "limit": [{"mm": 2.0, "copy": 9.0}, {"mm": 2.0, "copy": 9.0}, {"mm": 2.0, "copy": 9.0}],
    "peft": [{"mm": 8.0}, {"mm": 8.0}, {"mm": 8.0}],
}
CALLS = {"ours": {"mm": 3, "add": 1}, "limit": {"mm": 2, "copy": 1}, "peft": {"mm": 4}}


def test_rows_are_medians_and_what_ours_adds_comes_first():
    first, second, last = profiling.rows(TIMES, CALLS)
    assert first == {
        "operation": "mm",
        "milliseconds": {"ours": 6.0, "limit": 2.0, "peft": 8.0},
        "calls": {"ours": 3, "limit": 2, "peft": 4},
    }
    assert second["milliseconds"] == {"ours": 1.0, "limit": 0.0, "peft": 0.0}
    assert last["operation"] == "copy" and last["calls"] == {"ours": 0, "limit": 1, "peft": 0}


def test_the_page_has_large_operations_the_sums_of_all_and_the_floor():
    rows = [{"case": "bert_wide", **row} for row in profiling.rows(TIMES, CALLS)]
    arms = ("ours", "limit", "peft")
    tiny = {"milliseconds": dict.fromkeys(arms, 0.001), "calls": dict.fromkeys(arms, 1)}
    rows.append({"case": "bert_wide", "operation": "tiny", **tiny})
    head = {
        "date": "2026-01-01",
        "machine": "a machine",
        "versions": {"keras": importlib.metadata.version("keras")},
    }
    floors = [{"case": "bert_wide", "flops": 6e8, "flops_per_second": 2e11}]
    result = {**head, "profile": rows, "floors": floors}
    lines = report.as_markdown("profile", result).splitlines()
    assert "| bert_wide | `mm` | 6.0 (3) | 2.0 (2) | 8.0 (4) | +4.0 |" in lines
    assert lines[-3:-1] == ["| bert_wide | all | 7.0 | 11.0 | 8.0 | -4.0 |", ""]
    assert lines[-1] == (
        "bert_wide: at 200 GFLOP/s, which the fastest product of large matrices reaches here, "
        "the 0.6 GFLOP of PEFT's products take 3 ms, 0.37 of its operations' time."
    )
    assert not any("tiny" in line for line in lines)


def test_operations_of_a_tiny_model_in_a_process_of_its_own(backend):
    options = argparse.Namespace(backends=[backend], cases=["tiny_resnet"], dtype=None)
    found = parts.run_profile(options)
    rows = found["profile"]
    if backend != "torch":  # the others run a step as one program
        assert found == {"profile": [], "floors": []}
        return
    assert {arm for row in rows for arm in row["milliseconds"]} == {"ours", "limit", "peft"}
    (convolution,) = (row for row in rows if row["operation"] == "aten::mkldnn_convolution")
    calls = convolution["calls"]
    assert calls["ours"] > calls["limit"] > 0
    assert convolution["milliseconds"]["ours"] > 0
    (floor,) = found["floors"]
    assert floor["flops"] > 0 and floor["flops_per_second"] > 1e8


def test_products_are_counted_and_timed(monkeypatch):
    torch = pytest.importorskip("torch")
    a, b = torch.ones((3, 5), requires_grad=True), torch.ones((5, 7))
    assert profiling.counted(lambda: (a @ b).sum().backward()) == 2 * 2 * 3 * 5 * 7
    # A second between any two looks at the clock.
    monkeypatch.setattr(profiling.time, "perf_counter", itertools.count().__next__)
    assert profiling.fastest_rate(8) == 2 * 8**3
