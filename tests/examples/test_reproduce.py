"""The reproductions: their mathematics, their data, and every configuration for two steps."""

import importlib
import json
import pathlib
import tomllib
import types

import keras
import numpy as np
import pytest
from tolerances import assert_close

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "reproduce"
CONFIGS = sorted((FOLDER / "configs").glob("*.toml"))
# A difference quotient of float64 losses with steps of 1e-6.
DIFFERENCE_QUOTIENT = 1e-5


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def test_the_toy_gradients_are_difference_quotients(module):
    toy = module("toy")
    hidden, targets, a, b, w_out = (v.astype("float64") for v in toy.setting(0, "both"))
    hidden, targets = hidden[:20], targets[:20]
    _, slope_a, slope_b = toy.gradients(hidden, targets, a, b, w_out)
    rng = np.random.default_rng(1)
    for value, slope in ((a, slope_a), (b, slope_b)):
        direction = rng.normal(size=value.shape)
        sides = []
        for step in (1e-6, -1e-6):
            moved = [x + step * direction if x is value else x for x in (a, b)]
            sides.append(toy.loss(hidden, targets, *moved, w_out))
        expected = (sides[0] - sides[1]) / 2e-6
        assert abs(expected) > 1e-3
        assert_close(np.sum(slope * direction), expected, DIFFERENCE_QUOTIENT)


def test_the_toy_training_learns_and_diverges_where_it_should(module):
    toy = module("toy")
    setting = toy.setting(0, "loraplus")
    before = toy.loss(setting[0][toy.TRAIN :], setting[1][toy.TRAIN :], *setting[2:])
    ten, more = toy.descend(*setting, 0.03, 0.5, read_after=(10, 30))
    assert more < ten < before
    with np.errstate(over="ignore", invalid="ignore"):
        assert toy.descend(*setting, 1e3, 1e3, read_after=(2, 10))[1] == np.inf


def test_the_widths_are_trained_as_keras_adam_does(module):
    width = module("width")
    z, through, targets, w_out = data = width.setting(8, 0)
    a, b = width.factors(8, "lora", 0)
    pair = [keras.Variable(a), keras.Variable(b)]
    parts = [
        keras.optimizers.Adam(rate, epsilon=width.EPSILON) for rate in (0.03, 0.1)
    ]  # one optimizer a rate
    losses = []
    for _ in range(3):
        values = [np.asarray(keras.ops.convert_to_numpy(v), "float64") for v in pair]
        before = through + z @ values[0] @ values[1]
        error = np.maximum(before, 0) @ w_out - targets
        losses.append(np.mean(error**2))
        slope = (before > 0) * w_out * (2 / len(targets) * error)[:, None]
        slopes = (z.T @ slope @ values[1].T, (z @ values[0]).T @ slope)
        for optimizer, variable, gradient in zip(parts, pair, slopes, strict=True):
            optimizer.apply([keras.ops.convert_to_tensor(gradient.astype("float32"))], [variable])
    found = width.final_loss(data, a, b, 0.03, 0.1, steps=3)
    assert losses[-1] < losses[0]
    assert_close(found, np.mean(losses), 1e-3)


def results(name):
    path = FOLDER / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_committed_toy_results_follow_from_the_committed_losses(module):
    toy, content = module("toy"), results("toy")
    tables = {(r["init"], r["seed"], r["steps"]): r["rows_are_eta_b"] for r in content["losses"]}
    assert {key[0] for key in tables} == set(toy.SCALES)
    assert {key[2] for key in tables} == set(toy.READ_AFTER)
    for row in content["best"]:
        table = np.array(tables[row["init"], row["seed"], row["steps"]], "float64")
        found = toy.summary(np.where(np.isnan(table), np.inf, table))
        assert found["eta_a"] == row["eta_a"] and found["eta_b"] == row["eta_b"]
        assert found["ratio"] == row["ratio"] == row["eta_b"] / row["eta_a"]


@pytest.fixture
def data_folder(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for part, count in (("train", 40), ("test", 8)):
        lines = [f"{i % 2}\tgood day {i % 2}\tnot so bad" for i in range(count)]
        (folder / f"{part}.tsv").write_text("\n".join(["label\ttext_a\ttext_b", *lines]) + "\n")
    return folder


def test_tasks_are_read_split_and_cut(module, data_folder):
    tasks = module("tasks")
    task = tasks.load("pairs", data_folder)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [32, 8, 8]
    assert task.classes == ["0", "1"] and set(task.validation.labels) == {0, 1}
    assert task.train.second[0] == "not so bad"
    for text, label in zip(task.train.first, task.train.labels, strict=True):
        assert text == f"good day {label}"
    cut = tasks.load("pairs", data_folder, train_texts=6, validation_texts=4)
    assert len(cut.train) == 6 and len(cut.validation) == 4
    assert tasks.load("pairs", data_folder, train_texts=6).train.first == cut.train.first
    with pytest.raises(Exception, match="no such file"):
        tasks.load("pairs", data_folder / "nowhere")


def tiny_roberta(folder):
    import keras_hub

    letters = sorted(set("goodaynotsbad01Ġ"))
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, "od", "ay", "<mask>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backbone = keras_hub.models.RobertaBackbone(
        vocabulary_size=len(vocabulary),
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=32,
    )
    backbone.save_to_preset(str(folder))
    tokenizer = keras_hub.models.RobertaTokenizer(vocabulary=vocabulary, merges=["o d", "a y"])
    tokenizer.save_to_preset(str(folder))
    return folder


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_takes_two_steps_on_a_tiny_random_model(
    path, module, data_folder, tmp_path, preset
):
    glue, tasks = module("glue"), module("tasks")
    config = tomllib.loads(path.read_text(encoding="utf-8"))
    used = tiny_roberta(tmp_path / "roberta") if "roberta" in config["preset"] else preset
    config |= {"sequence_length": 16, "batch_size": 4, "epochs": 1, "seeds": [0]}
    grids = config["eta_a"], config["eta_b"]
    assert all(len(grid) >= 5 and grid == sorted(grid) for grid in grids)
    config |= {"eta_a": grids[0][2:3], "eta_b": grids[1][2:3]}
    task = tasks.load("pairs", data_folder, train_texts=8, validation_texts=4, test_texts=4)
    init = next(iter(config["tasks"].values()))[-1]
    overrides = {"progress": False}
    if path.stem != "minilm":  # fewer models to compile
        overrides |= {"test": None, "lora": False}
    result = glue.sweep_task(config, task, str(used), init, None, **overrides)
    arms = ["loraplus"] if "lora" in overrides else ["loraplus", "lora"]
    found = [(record["arm"], record["status"]) for record in result.records]
    assert found == [(arm, "complete") for arm in arms]
    assert all(record["metrics"]["train_loss"] > 0 for record in result.records)
    found = glue.summary(result)
    assert found["loraplus"]["lr_ratio"] == pytest.approx(grids[1][2] / grids[0][2])
    assert found["missing"] == 0
    assert len(found["test_accuracy"]["lora"]) == (0 if "test" in overrides else 1)
    output = tmp_path / "glue"
    glue.write(output, config, [result])
    assert json.loads(output.with_suffix(".json").read_text())["sweeps"][0]["task"] == "pairs"
    assert output.with_suffix(".png").stat().st_size > 1000


def test_ratios_of_a_sweep_that_learned_nothing_are_not_shown(module, monkeypatch, tmp_path):
    glue = module("glue")
    shown = []
    monkeypatch.setattr(
        "keras_loraplus.tuning.plot_ratio_distribution",
        lambda results, ax: (shown.extend(results), ax.bar([1], [2], label="a sweep"), ax.legend()),
    )
    monkeypatch.setattr("keras_loraplus.tuning.plot_heatmap", lambda result, ax: ax.legend([]))
    result = types.SimpleNamespace(seeds=[0])
    for names in (["idle"], ["idle", "busy"]):
        done = [
            ({"task": name, "init": "lora", "cells": [1], "learned": name == "busy"}, result)
            for name in names
        ]
        glue.draw(done, tmp_path / "drawn.png")
    assert shown == ["busy, lora"]
    assert (tmp_path / "drawn.png").stat().st_size > 1000


@pytest.mark.parametrize(("accuracy", "learned"), [(0.7, False), (0.705, False), (0.72, True)])
def test_a_sweep_learned_where_it_beats_the_most_frequent_class(module, accuracy, learned):
    cell = dict.fromkeys(("eta_a", "eta_b", "lr_ratio", "std", "values"), 0.0)
    result = types.SimpleNamespace(
        cells=lambda arm: [{**cell, "mean": accuracy if arm == "lora" else 0.6}],
        setup={"about": {"task": "t", "init": "lora", "most_frequent_class": 0.7}},
        **{"test": [], "records": [], "missing": 0, "versions": {}},
    )
    found = module("glue").summary(result)
    assert found["learned"] is learned
    assert found["hard"]


def test_a_finished_sweep_is_kept_and_not_run_again(module, data_folder, tmp_path, preset, capsys):
    glue = module("glue")
    lines = [
        f'preset = "{preset}"\ndtype = "float32"\nschedule = "constant"\nhead_rate = 1e-3',
        "rank = 2\nsequence_length = 32\nbatch_size = 4\nepochs = 1\nseeds = [0]",
        "train_texts = 8\nvalidation_texts = 4\ntest_texts = 4\neta_a = [1e-3]\neta_b = [1e-2]",
        '[sequence_lengths]\npairs = 16\n[tasks]\npairs = ["loraplus"]\nother = ["lora"]',
    ]
    path = tmp_path / "config.toml"
    path.write_text("\n".join(lines))
    config = glue.read_config(path)
    assert glue.setting_of(config, "pairs")["sequence_length"] == 16
    assert glue.setting_of(config, "other")["sequence_length"] == 32
    output = tmp_path / "found"
    arguments = ["--config", path, "--storage", tmp_path / "store", "--output", output]
    arguments += ["--backend", keras.backend.backend(), "--tasks", "pairs"]
    arguments = [str(argument) for argument in arguments]

    glue.main([*arguments, "--data", f"pairs={data_folder}"])
    kept = output / "pairs_loraplus.json"
    first = json.loads(output.with_suffix(".json").read_text())
    assert [sweep["task"] for sweep in first["sweeps"]] == ["pairs"]

    # No data, no storage: what is kept is all that it takes.
    (tmp_path / "store" / "pairs_loraplus.db").unlink()
    capsys.readouterr()
    glue.main(arguments)
    assert "pairs, init loraplus\n" not in capsys.readouterr().out
    assert json.loads(output.with_suffix(".json").read_text()) == first
    with pytest.raises(Exception, match="names no folder for other"):
        glue.main([*arguments[:-1], "other"])
    before = kept.read_bytes()
    path.write_text(path.read_text().replace("rank = 2", "rank = 3"))
    with pytest.raises(Exception, match="is of another setting"):
        glue.main(arguments)
    assert kept.read_bytes() == before
