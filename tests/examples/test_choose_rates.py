"""How default rates are chosen, and that the committed file was written that way."""

import json

import pytest

import choose_rates
import finetune_text_classifier as demo

SETTINGS = ("learning_rate", "lr_ratio", "head_multiplier")


def trial(rate, accuracy, loss, seed=0, method="lora"):
    return {
        "method": method,
        "learning_rate": rate,
        "lr_ratio": 1.0,
        "head_multiplier": 2.0,
        "seed": seed,
        "validation_accuracy": accuracy,
        "validation_loss": loss,
    }


@pytest.mark.parametrize(
    "trials, rate",
    [
        ([trial(1e-3, 0.90, 0.1), trial(2e-3, 0.95, 0.9)], 2e-3),
        ([trial(1e-3, 0.95, 0.3), trial(2e-3, 0.95, 0.2), trial(4e-3, 0.95, 0.4)], 2e-3),
        ([trial(1e-3, 0.99, 0.1, 0), trial(1e-3, 0.80, 0.1, 1), *(
            trial(2e-3, 0.92, 0.1, seed) for seed in (0, 1))], 2e-3),
        # One lucky seed does not win over two.
        ([trial(1e-3, 0.99, 0.1), *(trial(2e-3, 0.92, 0.1, seed) for seed in (0, 1))], 2e-3),
    ],
)  # fmt: skip
def test_the_best_mean_validation_accuracy_wins(trials, rate):
    assert choose_rates.choose(trials)["lora"]["learning_rate"] == rate


def test_the_committed_rates_follow_from_the_committed_trials():
    content = json.loads(demo.RATES.read_text(encoding="utf-8"))
    assert content["chosen"] == choose_rates.choose(content["trials"])
    assert content["setup"] == choose_rates.SETUP
    tried = {
        method: sorted(
            tuple(trial[name] for name in (*SETTINGS, "seed"))
            for trial in content["trials"]
            if trial["method"] == method
        )
        for method in ("loraplus", "lora")
    }
    # Tuned alike: as many settings and the same seeds for both methods, each once.
    assert len(tried["loraplus"]) == len(tried["lora"]) >= 8
    for method, trials in tried.items():
        assert len(set(trials)) == len(trials)
        grid = [tuple(t[n] for n in SETTINGS) for t in choose_rates.grid(method, 0)]
        assert {settings[:3] for settings in trials} == set(grid)
    assert {t[-1] for t in tried["loraplus"]} == {t[-1] for t in tried["lora"]}


def test_the_demo_reads_its_defaults_from_the_file_and_options_win():
    chosen = json.loads(demo.RATES.read_text(encoding="utf-8"))["chosen"]
    options = demo.parse(["--head-multiplier", "3"])
    assert demo.rates_for("loraplus", options) == {**chosen["loraplus"], "head_multiplier": 3.0}
    assert demo.rates_for("lora", options) == chosen["lora"]
