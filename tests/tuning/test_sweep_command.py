"""`python -m keras_loraplus sweep`: a small sweep from a file, and what is wrong with files."""

import json
import pathlib
import tomllib

import keras
import numpy as np
import pytest
from tiny_presets import save_bert

import prepare_text_sweep
from keras_loraplus import tuning
from keras_loraplus.__main__ import main
from keras_loraplus.tuning import text
from keras_loraplus.tuning.command import read_config

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "sweep_text.toml"
WORDS = {"earn": ["profit", "dividend", "shares"], "grain": ["wheat", "corn", "harvest"]}


@pytest.fixture
def data(tmp_path):
    """Texts whose label shows in their words; `dev.tsv` is there, and no second text."""
    rng = np.random.default_rng(3)
    folder = tmp_path / "topics"
    folder.mkdir()
    for part, count in (("train", 48), ("dev", 12), ("test", 12)):
        lines = ["label\ttext_a\ttext_b"]
        for number in range(count):
            label = list(WORDS)[number % 2]
            lines.append(f"{label}\t{' '.join(rng.choice(WORDS[label], size=4))}\t")
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def preset(tmp_path):
    """A random BERT of one narrow layer with its tokenizer."""
    return save_bert(tmp_path / "tiny_bert", [*WORDS["earn"], *WORDS["grain"]])


@pytest.fixture
def write(tmp_path):
    """Writes a configuration; a value of None leaves a key out."""

    def write(**given):
        settings = {
            "data": str(tmp_path / "topics"),
            "preset": str(tmp_path / "tiny_bert"),
            "storage": str(tmp_path / "sweep.db"),
            "output": str(tmp_path / "result.json"),
            "eta_a": [1e-3, 1e-2],
            "lr_ratio": 8.0,
            "head_rate": 5e-2,
            "rank": 2,
            "sequence_length": 8,
            "batch_size": 8,
            **given,
        }
        lines = [f"{k} = {json.dumps(v)}" for k, v in settings.items() if v is not None]
        path = tmp_path / "sweep.toml"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def sweep(path, *options):
    return main(["sweep", "--config", str(path), *options])


def test_a_sweep_from_a_file_and_again(write, data, preset, tmp_path, capsys, monkeypatch):
    path = write(init="lora", targets=["query"], lora=False, epochs=5)
    assert sweep(path) == 0
    printed = capsys.readouterr().out
    assert "LoRA+" in printed and "To start from:" in printed and "result.json" in printed
    result = tuning.load(tmp_path / "result.json")
    found = [(r["arm"], r["eta_a"], r["eta_b"], r["head_rate"]) for r in result.records]
    assert found == [("loraplus", a, pytest.approx(8 * a), 5e-2) for a in (1e-3, 1e-2)]
    assert [r["status"] for r in result.records] == ["complete"] * 2
    assert result.selected("loraplus")["mean"] > 0.8  # half the texts are of one class
    about = result.setup["about"]
    assert about["rows"] == {"train": 48, "validation": 12, "test": 12}
    assert (about["init"], about["targets"], about["task"]) == ("lora", ["query"], "topics")
    assert result.setup["schedule"] == "linear"
    assert len(result.tested("loraplus")) == 1
    # Resumed: every cell is known, so that none is trained, and the result is the same.
    monkeypatch.setattr(keras.Model, "fit", None)
    (tmp_path / "result.json").unlink()
    assert sweep(path) == 0
    assert tuning.load(tmp_path / "result.json").records == result.records
    # Trained in another way, it is another sweep.
    assert sweep(write(init="lora", targets=["query"], lora=False, epochs=6)) == 2
    assert "trained in another way" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": 1e-3}, "unknown keys ['learning_rate']; the keys are data, preset,"),
        ({"data": None, "storage": None}, "missing keys ['data', 'storage']"),
        ({"rank": "8"}, "'rank' must be a whole number >= 1. Received: '8'"),
        ({"epochs": True}, "'epochs' must be a whole number >= 1"),
        ({"train_texts": -1}, "'train_texts' must be a whole number, 0 for all"),
        ({"preset": 3}, "'preset' must be a text"),
        ({"init": "zeros"}, "'init' must be one of ('loraplus', 'lora')"),
        ({"schedule": "cosine"}, "'schedule' must be one of"),
        ({"lora": 1}, "'lora' must be one of (True, False)"),
        ({"seeds": [0, 0]}, "'seeds' must be a list of different"),
        ({"targets": []}, "'targets' must be a text or a list"),
        ({"eta_a": ["fast"]}, "`eta_a` must be a positive number"),
        ({"lr_ratio": None}, "either as `eta_b` (rates) or as `lr_ratio`"),
        ({"full": "yes"}, "`eta_a` must be a positive number"),
        ({"head_rate": None}, "the new head's rate is missing"),
        ({"output": "nowhere/result.json"}, "there is no folder 'nowhere'"),
        ({"data": "nowhere"}, "no such file; a task's folder has train.tsv"),
    ],
)
def test_a_wrong_file_is_one_line_and_exit_code_2(write, given, message, capsys, monkeypatch):
    monkeypatch.setattr(text, "Builder", None)
    monkeypatch.setattr(text, "encode", None)
    assert sweep(write(**given)) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1 and not printed.out


def test_a_model_that_does_not_fit_is_found_before_the_sweep(write, data, preset, tmp_path, capsys):
    for given, message in [
        ({"preset": str(tmp_path / "nowhere")}, "Expected a KerasHub preset, or a folder"),
        ({"targets": "no_such_layer"}, "no_such_layer"),
        ({"sequence_length": 32}, "32"),
        ({"dtype": "float33"}, "float33"),
    ]:
        assert sweep(write(**given)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "sweep.db").exists()


def test_no_toml_no_file_and_no_table(write, tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text("rank = ", encoding="utf-8")
    assert sweep(path) == 2 and "is no TOML" in capsys.readouterr().err
    assert sweep(tmp_path / "nowhere.toml") == 2
    assert "nowhere.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["text\tlabel", "a\tb"], "expected a header with the columns label, text_a and text_b"),
        (["label\ttext_a"], "holds no rows"),
        (["label\ttext_a", "1\ta", "2"], "row 2 has no label or no text_a"),
        (["label\ttext_a", "1\ta", "1\tb"], "at least two different labels"),
        (["label\ttext_a", "1\ta", "2\tb"], "too few training texts to hold out"),
    ],
)
def test_tables_that_are_none(tmp_path, lines, message):
    for part in ("train", "test"):
        (tmp_path / f"{part}.tsv").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        text.read_task(tmp_path)


def test_the_example_is_a_configuration():
    config = read_config(EXAMPLE)
    assert tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))["eta_a"] == config.eta_a
    assert config.lora and config.init == "loraplus"


def test_the_examples_texts_and_model_are_put_where_it_looks(tmp_path, monkeypatch):
    texts = prepare_text_sweep.data.Texts(
        [f'a "quoted" text {i}' for i in range(10)], np.arange(10) % 2
    )
    dataset = prepare_text_sweep.data.Dataset("R8", ["earn", "grain"], texts, texts)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(prepare_text_sweep.data, "load_reuters", lambda: dataset)
    monkeypatch.setattr(prepare_text_sweep, "fetch", lambda wheel: model)
    monkeypatch.chdir(tmp_path)
    prepare_text_sweep.main([])
    config = read_config(EXAMPLE)
    task = text.read_task(config.data)
    assert (task.name, task.classes) == ("r8", ["earn", "grain"])
    assert len(task.train) == 8 and sorted(task.test.first) == texts.texts
    assert (tmp_path / config.preset / "config.json").exists()
