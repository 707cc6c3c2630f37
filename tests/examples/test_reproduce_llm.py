"""The language-model row: what counts, what is right, and every configuration for two steps."""

import importlib
import json
import pathlib
import tomllib

import keras
import numpy as np
import pytest
from tolerances import FLOAT32_MODEL, assert_close

from keras_loraplus.tuning.text import Part, Task

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "reproduce"
CONFIGS = sorted((FOLDER / "configs" / "llm").glob("*.toml"))
SPECIAL = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
VOCABULARY = [*(f"<|{name}|>" for name in SPECIAL), "Ġ", "-", ">", *"abcdeino", "do"]


@pytest.fixture
def llm(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("llm")


@pytest.fixture
def task(llm):
    texts = ["a bad bed", "no idea", "a bee", "i nod"] * 2
    part = Part(texts, None, np.array([0, 1] * 4, "int32"))
    return Task("tiny", ["do_a", "be"], part, part, part)


@pytest.fixture
def preset(tmp_path):
    import keras_hub

    folder = tmp_path / "llama"
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=len(VOCABULARY),
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=32,
    )
    backbone.save_to_preset(str(folder))
    tokens = {token: index for index, token in enumerate(VOCABULARY)}
    keras_hub.models.Llama3Tokenizer(vocabulary=tokens, merges=["d o"]).save_to_preset(str(folder))
    return str(folder)


def test_the_answers_tokens_count_and_no_others(llm, task, preset):
    import keras_hub

    tokenizer = keras_hub.models.Tokenizer.from_preset(preset)
    inputs, targets = llm.encode(tokenizer, task.train, task.classes, 16)
    spelled = lambda ids: "".join(VOCABULARY[i] for i in ids)  # noqa: E731
    row = 0
    count = int(inputs["padding_mask"][row].sum())
    assert spelled(inputs["token_ids"][row, :count]) == "aĠbadĠbedĠ->ĠdoĠa"
    assert spelled(targets[row][targets[row] >= 0]) == "ĠdoĠa<|end_of_text|>"
    assert targets[row, count - 1] == tokenizer.end_token_id and (targets[row, count:] < 0).all()
    assert not inputs["padding_mask"][row, count:].any()
    # A text that is too long loses its beginning, never its answer.
    _, targets = llm.encode(tokenizer, task.train, task.classes, 8)
    assert spelled(targets[row][targets[row] >= 0]) == "ĠdoĠa<|end_of_text|>"
    with pytest.raises(Exception, match="more than 3"):
        llm.encode(tokenizer, task.train, task.classes, 3)


def test_loss_and_exact_match_are_keras_loss_and_greedy_decoding(llm, task, preset):
    import keras_hub

    model = llm.load_model(preset, "float32")
    tokenizer = keras_hub.models.Tokenizer.from_preset(preset)
    data = llm.encode(tokenizer, task.train, task.classes, 16)
    inputs, targets = data
    counts = targets >= 0
    logits = np.asarray(keras.ops.convert_to_numpy(model(inputs)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = llm.measure(model, data, 3)
    assert_close(found["loss"], float(loss(targets[counts], logits[counts])), FLOAT32_MODEL)
    assert found["exact_match"] == 0.0
    # What the model itself would write is right, wherever it counts.
    own = np.where(counts, logits.argmax(axis=-1), -1)
    assert llm.measure(model, (inputs, own), 3)["exact_match"] == 1.0
    own[2, np.argmax(counts[2])] += 1
    assert (
        llm.measure(model, (inputs, np.where(counts, own % len(VOCABULARY), -1)), 3)["exact_match"]
        == 7 / 8
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_takes_two_steps_on_a_tiny_random_model(
    path, llm, task, preset, tmp_path
):
    config = tomllib.loads(path.read_text(encoding="utf-8"))
    assert {"int4"} < set(config["bases"]) and 1.0 in config["lr_ratio"]
    config |= {"sequence_length": 16, "batch_size": 4, "epochs": 1, "seeds": [0], "rank": 4}
    config |= {"eta_a": config["eta_a"][-1:], "lr_ratio": [1.0, 16.0]}
    overrides = {"progress": False}
    if path.stem != "smollm2":  # fewer models to compile
        config["lr_ratio"], overrides["test"] = [16.0], None
    result = llm.sweep_base(config, task, preset, config["bases"][0], None, **overrides)
    assert len(result.test) == (0 if "test" in overrides else 1)
    assert [record["error"] for record in result.records] == [None] * len(config["lr_ratio"])
    assert all(np.isfinite(record["metrics"]["loss"]) for record in result.records)
    llm.write(tmp_path / "llm", config, [result])
    content = json.loads((tmp_path / "llm.json").read_text())
    assert sorted(content["bases"][0]["best_by_ratio"]) == [
        f"{ratio:g}" for ratio in config["lr_ratio"]
    ]
    assert (tmp_path / "llm.png").stat().st_size > 1000

    # A kept result is taken for the same setting only, whatever other bases there are.
    kept = tmp_path / "kept.json"
    assert llm.common.read_kept(kept, llm.setting_of(config)) is None
    result.save(kept)
    found = llm.common.read_kept(kept, llm.setting_of(config | {"bases": ["bfloat16"]}))
    assert found.records == result.records
    with pytest.raises(Exception, match="is of another setting"):
        llm.common.read_kept(kept, llm.setting_of(config | {"rank": 5}))
