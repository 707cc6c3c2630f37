"""A step's operations on torch: their order, their page, and a tiny model's."""

import argparse
import importlib.metadata

from benchmarks import parts, profiling, report

TIMES = {
    "ours": [{"mm": 5.0, "add": 1.0}, {"mm": 7.0, "add": 1.0}, {"mm": 6.0}],
    "limit": [{"mm": 2.0, "copy": 9.0}, {"mm": 2.0, "copy": 9.0}, {"mm": 2.0, "copy": 9.0}],
}
CALLS = {"ours": {"mm": 3, "add": 1}, "limit": {"mm": 2, "copy": 1}}


def test_rows_are_medians_and_what_ours_adds_comes_first():
    first, second, last = profiling.rows(TIMES, CALLS)
    assert first == {
        "operation": "mm",
        "milliseconds": {"ours": 6.0, "limit": 2.0},
        "calls": {"ours": 3, "limit": 2},
    }
    assert second["milliseconds"] == {"ours": 1.0, "limit": 0.0}
    assert last["operation"] == "copy" and last["calls"] == {"ours": 0, "limit": 1}


def test_the_page_has_large_operations_and_the_sums_of_all():
    rows = [{"case": "bert_wide", **row} for row in profiling.rows(TIMES, CALLS)]
    tiny = {"milliseconds": {"ours": 0.001, "limit": 0.0}, "calls": {"ours": 1, "limit": 0}}
    rows.append({"case": "bert_wide", "operation": "tiny", **tiny})
    head = {
        "date": "2026-01-01",
        "machine": "a machine",
        "versions": {"keras": importlib.metadata.version("keras")},
    }
    lines = report.as_markdown("profile", {**head, "profile": rows}).splitlines()
    assert "| bert_wide | `mm` | 6.0 (3) | 2.0 (2) | +4.0 |" in lines
    assert lines[-1] == "| bert_wide | all | 7.0 | 11.0 | -4.0 |"
    assert not any("tiny" in line for line in lines)


def test_operations_of_a_tiny_model_in_a_process_of_its_own(backend):
    options = argparse.Namespace(backends=[backend], cases=["tiny_resnet"], dtype=None)
    rows = parts.run_profile(options)["profile"]
    if backend != "torch":  # the others run a step as one program
        assert rows == []
        return
    assert {arm for row in rows for arm in row["milliseconds"]} == {"ours", "limit", "peft"}
    (convolution,) = (row for row in rows if row["operation"] == "aten::mkldnn_convolution")
    calls = convolution["calls"]
    assert calls["ours"] > calls["limit"] > 0
    assert convolution["milliseconds"]["ours"] > 0
