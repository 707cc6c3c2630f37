"""`python -m keras_loraplus convert`, both ways, and its errors."""

import json

import keras_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from hugging_face_cases import CASES, inputs, keras_output, load_keras
from keras import ops
from lora_cases import randomize_factors
from safetensors.numpy import load_file
from tolerances import FLOAT32, HUB_AGAINST_TRANSFORMERS, assert_close

import keras_loraplus as klp
from keras_loraplus.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CASE = CASES["bert"]


def test_there_and_back(bert, tmp_path, capsys):
    backbone = load_keras(bert)
    klp.enable_lora_plus(backbone, rank=2, alpha=3)
    randomize_factors(backbone)
    ours, folder, back = (str(tmp_path / name) for name in ("a.safetensors", "b", "c.safetensors"))
    klp.save_adapter(backbone, ours)
    assert main(["convert", ours, folder, "--checkpoint", str(bert)]) == 0
    assert main(["convert", folder, back, "--checkpoint", str(bert)]) == 0
    assert f"Written: {back}" in capsys.readouterr().out
    again = klp.load_adapter(load_keras(bert), back)
    expected = keras_output(CASE, backbone, inputs(CASE))
    assert_close(keras_output(CASE, again, inputs(CASE)), expected, 10 * FLOAT32)


def classifier_with_adapter(folder, classes=5):
    model = keras_hub.models.BertTextClassifier(
        backbone=load_keras(folder), num_classes=classes, preprocessor=None
    )
    klp.enable_lora_plus(model, rank=2, alpha=3)
    randomize_factors(model)
    rng = np.random.default_rng(3)
    head = model.get_layer("logits")
    head.set_weights([rng.normal(size=v.shape).astype("float32") for v in head.weights])
    return model


TASK = ["--task", "TextClassifier", "--head", "classifier=logits"]


def test_a_task_with_its_head_there_and_back(bert, tmp_path):
    model = classifier_with_adapter(bert)
    ours, folder, back = (str(tmp_path / name) for name in ("a.safetensors", "b", "c.safetensors"))
    klp.save_adapter(model, ours)
    common = ["--checkpoint", str(bert), *TASK]
    writing = ["--prefix", "bert.", "--task-type", "SEQ_CLS"]
    assert main(["convert", ours, folder, *common, *writing]) == 0

    tensors = load_file(tmp_path / "b" / "adapter_model.safetensors")
    head = model.get_layer("logits")
    stored = tensors["base_model.model.classifier.weight"]
    assert np.array_equal(stored, ops.convert_to_numpy(head.kernel).T)
    assert (
        json.loads((tmp_path / "b" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    )
    config = transformers.BertConfig.from_pretrained(bert, num_labels=5, hidden_act="gelu_new")
    base = transformers.BertForSequenceClassification.from_pretrained(bert, config=config)
    theirs = peft.PeftModel.from_pretrained(base.eval(), folder).eval()
    tokens = inputs(CASE)
    with torch.no_grad():
        ids = torch.tensor(tokens.astype("int64"))
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    features = {
        "token_ids": tokens,
        "padding_mask": np.ones_like(tokens),
        "segment_ids": np.zeros_like(tokens),
    }
    expected = ops.convert_to_numpy(model(features))
    assert_close(logits, expected, HUB_AGAINST_TRANSFORMERS)

    assert main(["convert", folder, back, *common]) == 0
    twin = keras_hub.models.BertTextClassifier(
        backbone=load_keras(bert), num_classes=5, preprocessor=None
    )
    klp.load_adapter(twin, back)
    assert_close(ops.convert_to_numpy(twin(features)), expected, 10 * FLOAT32)


def test_what_a_task_needs_is_said(bert, tmp_path, capsys):
    path = str(tmp_path / "a.safetensors")
    klp.save_adapter(classifier_with_adapter(bert), path)
    target = tmp_path / "out"
    common = ["convert", path, str(target), "--checkpoint", str(bert)]
    for arguments, said in [
        ([], "--task TextClassifier"),
        (TASK[2:], "Received no --task"),
        (TASK[:2], "modules_to_save"),
        (["--task", "TextClassifier", "--head", "logits"], "expected MODULE=LAYER"),
        (["--task", "NoSuchTask"], "'BertMaskedLM', 'BertTextClassifier'"),
        (["--task", "CausalLM"], "Received: 'CausalLM'"),
    ]:
        assert main([*common, *arguments]) == 2
        assert said in capsys.readouterr().err
        assert not target.exists()


@pytest.mark.parametrize("source", ["missing", "empty"])
def test_bad_input_is_one_line_and_exit_code_2(bert, tmp_path, capsys, source):
    (tmp_path / "empty").mkdir()
    target = tmp_path / "out.safetensors"
    arguments = ["convert", str(tmp_path / source), str(target), "--checkpoint"]
    assert main([*arguments, str(bert)]) == 2
    assert main([*arguments, str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 2 and error.count("\n") == 2
    assert not target.exists()
