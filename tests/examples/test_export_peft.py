"""The demo's PEFT folder, of real MiniLM weights after real training, in transformers."""

import keras
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tolerances import HUB_AGAINST_TRANSFORMERS, assert_close, relative_error

import finetune_text_classifier as demo
from keras_loraplus.__main__ import main as command_line
from text_classification import training
from text_classification.downloads import MINILM, fetch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_transformers_gives_the_logits_of_the_demo(table, tmp_path):
    checkpoint = str(fetch(MINILM))
    columns = ["--text-column", "body", "--label-column", "topic"]
    settings = ["--limit", "32", "--epochs", "1", "--batch-size", "8", "--sequence-length", "16"]
    output = ["--output", str(tmp_path / "out"), "--export-peft", str(tmp_path / "peft")]
    demo.main(["--data", str(table), *columns, *settings, *output, "--quiet"])
    texts = ["wheat and corn", "profit of the quarter", "the company said"]
    inputs = training.tokenize(checkpoint, texts, 16)
    merged = keras.models.load_model(tmp_path / "out" / "merged.keras")
    ours = merged.predict(inputs, verbose=0)

    # KerasHub's BERT has the tanh form of GELU, whatever the checkpoint says.
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification.from_pretrained(
        checkpoint, num_labels=2, hidden_act="gelu_new"
    ).eval()
    fields = {
        "input_ids": np.array(inputs["token_ids"]),
        "attention_mask": np.array(inputs["padding_mask"]),
        "token_type_ids": np.array(inputs["segment_ids"]),
    }
    fields = {name: torch.tensor(value.astype("int64")) for name, value in fields.items()}
    with torch.no_grad():
        plain = base(**fields).logits.numpy()
        model = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()
        theirs = model(**fields).logits.numpy()
    assert relative_error(ours, plain) > 0.1
    assert_close(theirs, ours, HUB_AGAINST_TRANSFORMERS)

    # The command line makes the same folder of the adapter file alone.
    task = ["--task", "TextClassifier", "--head", "classifier=logits"]
    names = ["--checkpoint", checkpoint, "--prefix", "bert.", "--task-type", "SEQ_CLS"]
    converted = tmp_path / "converted"
    source = str(tmp_path / "out" / "adapter.safetensors")
    assert command_line(["convert", source, str(converted), *task, *names]) == 0
    tensors, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (converted, tmp_path / "peft")
    )
    assert set(tensors) == set(expected)
    assert all(np.array_equal(tensors[key], expected[key]) for key in expected)


def test_what_cannot_be_exported_is_told_before_training(preset, table, tmp_path):
    arguments = ["--data", str(table), "--text-column", "body", "--label-column", "topic"]
    arguments += ["--output", str(tmp_path / "out"), "--export-peft", str(tmp_path / "peft")]
    with pytest.raises(demo.InputError, match="--export-peft goes with"):
        demo.parse([*arguments, "--method", "full"])
    with pytest.raises(demo.InputError, match="Hugging Face checkpoint folder"):
        demo.main([*arguments, "--preset", str(preset)])
