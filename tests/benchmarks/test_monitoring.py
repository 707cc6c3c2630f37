"""The monitor's share of a step's time: the arithmetic, the arms and the page."""

import argparse
import inspect

import pytest

import keras_loraplus as klp
from benchmarks import monitoring, report
from benchmarks.models import TINY
from benchmarks.rounds import Times


def test_the_share_is_that_of_a_hundred_steps_with_one_measurement():
    default = inspect.signature(klp.callbacks.LoRAPlusMonitor).parameters["every"].default
    assert monitoring.EVERY == default
    (share,) = monitoring.shares(step=[0.1], measured=[0.3], between=[0.001])
    assert share == pytest.approx((0.2 + 99 * 0.001) / 10)


def test_a_step_is_measured_and_what_lies_between_is_not():
    made = {name: make() for name, make in monitoring.arms(TINY["tiny_bert_qv"]).items()}
    for _ in range(3):
        for step in made.values():
            step()
    # The first step of each is measured, whatever `every` is.
    assert len(made["measured"].monitor.records) == 4
    assert len(made["between"].monitor.records) == 1
    deltas = made["measured"].monitor.records[-1]["layers"].values()
    assert all(row["delta1"] > 0 and row["delta2"] > 0 for row in deltas)


def test_a_share_above_the_bar_is_told(monkeypatch):
    seconds = {"step": [0.01] * 3, "measured": [0.02] * 3, "between": [1e-3] * 3}
    times = Times({("torch", arm): values for arm, values in seconds.items()})
    monkeypatch.setattr(monitoring, "measure", lambda *_, **__: times)
    found = monitoring.run(argparse.Namespace(blocks=2, dtype=None, backends=["torch"]))
    assert found["monitor"][0]["met"] is False
    header = {"date": "2026-01-01", "machine": "m", "versions": {"keras": "3"}, "blocks": 2}
    page = report.as_markdown("monitor", {**header, **found})
    assert "| torch | 10.0 | 20.0 | 10.9 % | 5 % (not met) |" in page
