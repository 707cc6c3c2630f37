"""The demo end to end, on a tiny random BERT and a tiny table."""

import json

import keras
import numpy as np
import pytest
from tolerances import BFLOAT16, FLOAT32_MODEL

import finetune_text_classifier as demo
import keras_loraplus as klp
from text_classification import data, report, training
from text_classification.downloads import MINILM, fetch

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def arguments(preset, table, tmp_path):
    def build(*more, output="out"):
        columns = ["--text-column", "body", "--label-column", "topic"]
        settings = ["--sequence-length", "16", "--rank", "2", "--batch-size", "8", "--quiet"]
        if "--adapter" in more:
            settings = settings[:2] + settings[4:]
        output = ["--output", str(tmp_path / output)]
        return ["--data", str(table), "--preset", str(preset), *columns, *settings, *output, *more]

    return build


def results(folder):
    content = json.loads((folder / "results.json").read_text())
    return content, {result["method"]: result for result in content["results"]}


def test_trains_compares_saves_and_loads(arguments, tmp_path, capsys):
    rates = ["--learning-rate", "0.01", "--head-multiplier", "4", "--epochs", "6"]
    demo.main(arguments("--compare", *rates))
    printed = capsys.readouterr().out
    content, by_method = results(tmp_path / "out")
    assert content["classes"] == ["earn", "grain"]
    assert list(by_method) == ["loraplus", "lora"]
    ours = by_method["loraplus"]
    # Query and value of two layers, each A (16, 2) and B (2, 2, 8), and a head (16, 2) with bias.
    assert ours["trainable_parameters"] == 2 * 2 * (16 * 2 + 2 * 16) + 16 * 2 + 2
    chosen = demo.rates_for("lora", demo.parse([]))
    assert by_method["lora"]["rates"] == chosen
    assert ours["rates"]["learning_rate"] == 0.01 and ours["rates"]["head_multiplier"] == 4.0
    assert ours["test_accuracy"] >= 0.9
    assert ours["merged_relative_difference"] <= FLOAT32_MODEL
    curves = ours["curves"]
    # 128 texts less a tenth held out, 8 a step.
    assert (len(curves["loss"]), len(curves["validation_loss"])) == (6 * 15, 6)
    assert np.mean(curves["loss"][-10:]) < np.mean(curves["loss"][:10])
    for text in ("lora_kernel_b", "logits/kernel", "trainable parameters: 290 of", "test accuracy"):
        assert text in printed
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(PNG)

    demo.main(arguments("--adapter", str(tmp_path / "out/adapter.safetensors"), output="again"))
    _, again = results(tmp_path / "again")
    assert again["loraplus"]["test_loss"] == pytest.approx(ours["test_loss"], rel=FLOAT32_MODEL)

    merged = keras.models.load_model(tmp_path / "out" / "merged.keras")
    assert not any("lora" in variable.path for variable in merged.variables)
    options = demo.parse(arguments())
    _, _, _, test = demo.load_data(options)
    inputs = training.tokenize(options.preset, test.texts, 16)
    predicted = np.argmax(merged.predict(inputs, verbose=0), axis=-1)
    assert np.mean(predicted == test.labels) == pytest.approx(ours["test_accuracy"])


def test_full_finetuning_trains_all_and_saves_a_plain_model(arguments, tmp_path):
    demo.main(arguments("--method", "full", "--epochs", "1"))
    _, by_method = results(tmp_path / "out")
    full = by_method["full"]
    model = keras.models.load_model(tmp_path / "out" / "model.keras")
    assert full["trainable_parameters"] == training.count(model.trainable_variables)
    assert not isinstance(model.optimizer, klp.LoRAPlusAdamW)
    assert not list((tmp_path / "out").glob("adapter*"))


def test_an_adapter_of_another_model_is_refused(arguments, tmp_path):
    demo.main(arguments("--epochs", "0"))
    adapter = tmp_path / "out" / "adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-10])
    with pytest.raises(demo.InputError, match="--adapter"):
        demo.main(arguments("--adapter", str(adapter), output="again"))


def test_minilm_trains_76808_parameters():
    """Rank 8 on query and value of six layers, and a head for eight classes; real weights."""
    model = training.build_classifier(str(fetch(MINILM)), 8)
    shown = klp.enable_lora_plus(model, rank=8)
    assert training.count(model.trainable_variables) == 76_808
    assert shown.trainable_parameters == 76_808
    assert training.head_patterns(model) == ["logits/.*"]


def test_reuters_has_its_known_size():
    dataset = data.load_reuters()
    assert (len(dataset.train), len(dataset.test), len(dataset.classes)) == (5485, 2189, 8)
    assert dataset.classes[0] == "acq" and dataset.train.labels.dtype == np.int32


def test_split_is_stratified_disjoint_and_seeded():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    rows, held_out = data.split(labels, 0.2, seed=3)
    assert sorted([*rows, *held_out]) == list(range(160))
    assert np.bincount(labels[held_out]).tolist() == [20, 10, 2]
    again = data.split(labels, 0.2, seed=3)
    assert np.array_equal(rows, again[0]) and np.array_equal(held_out, again[1])
    assert not np.array_equal(held_out, data.split(labels, 0.2, seed=4)[1])


def test_smooth_is_the_mean_of_the_last_values():
    assert report.smooth([1.0, 3.0, 5.0, 7.0], window=2).tolist() == [1.0, 2.0, 4.0, 6.0]


def test_a_quantized_run_in_mixed_precision(arguments, tmp_path):
    options = ["--quantize", "int4", "--dtype", "mixed_bfloat16"]
    rates = ["--learning-rate", "0.01", "--head-multiplier", "4", "--epochs", "6"]
    demo.main(arguments(*rates, *options))
    content, by_method = results(tmp_path / "out")
    ours = by_method["loraplus"]
    assert ours["test_accuracy"] >= 0.9
    assert ours["trainable_parameters"] == 2 * 2 * (16 * 2 + 2 * 16) + 16 * 2 + 2
    # Two layers, of some four roundings each on the way.
    assert ours["merged_relative_difference"] <= 8 * BFLOAT16
    assert content["setup"]["quantize"] == options[1]
    merged = keras.models.load_model(tmp_path / "out" / "merged.keras")
    modes = {layer.quantization_mode for layer in merged.backbone._flatten_layers()}
    assert modes == {None, options[1]}
    test = demo.load_data(demo.parse(arguments()))[3]
    inputs = training.tokenize(demo.parse(arguments()).preset, test.texts, 16)
    predicted = np.argmax(merged.predict(inputs, verbose=0), axis=-1)
    assert np.mean(predicted == test.labels) == pytest.approx(ours["test_accuracy"], abs=0.05)
    demo.main(
        arguments("--adapter", str(tmp_path / "out/adapter.safetensors"), *options, output="again")
    )
    _, again = results(tmp_path / "again")
    assert again["loraplus"]["test_loss"] == pytest.approx(ours["test_loss"], rel=FLOAT32_MODEL)
