"""The demo's default rates are what the sweep beside it selected, and that sweep was a fair one."""

import json

import finetune_text_classifier as demo
from keras_loraplus import tuning


def test_the_committed_rates_are_selected_by_the_committed_sweep():
    result = tuning.load(demo.RATES)
    content = json.loads(demo.RATES.read_text(encoding="utf-8"))
    assert json.loads(json.dumps(result.as_dict())) == content
    assert result.setup["monitor"] == result.monitor == "accuracy" and not result.missing
    tried = {
        arm: sorted(
            (r["eta_a"], r["eta_b"], r["head_rate"], r["seed"])
            for r in result.records
            if r["arm"] == arm
        )
        for arm in ("loraplus", "lora")
    }
    # Tuned alike: as many settings and the same seeds for both methods, each once.
    assert len(tried["loraplus"]) == len(tried["lora"]) == result.budget["lora"] >= 8
    for arm, cells in tried.items():
        assert len(set(cells)) == len(cells) == result.budget[arm] * len(result.seeds)
        best = max(r["value"] for r in result.records if r["arm"] == arm)
        assert result.selected(arm)["mean"] == best


def test_the_demo_reads_its_defaults_from_the_file_and_options_win():
    defaults = {
        "loraplus": {"learning_rate": 2e-3, "lr_ratio": 8.0, "head_multiplier": 8.0},
        "lora": {"learning_rate": 8e-3, "lr_ratio": 1.0, "head_multiplier": 4.0},
        "full": {"learning_rate": 1e-4, "lr_ratio": 1.0, "head_multiplier": 8.0},
    }
    options = demo.parse(["--head-multiplier", "3"])
    assert demo.rates_for("loraplus", options) == {**defaults["loraplus"], "head_multiplier": 3.0}
    for arm in ("lora", "full"):
        assert demo.rates_for(arm, options) == defaults[arm]
