"""A merged KerasHub model leaves by every door that a plain one has, with the same outputs."""

import keras
import keras_hub
import numpy as np
import pytest
from lora_cases import randomize, randomize_factors, snapshot
from tolerances import FLOAT32_MODEL, assert_close, relative_error

import keras_loraplus as klp

SIZE = {"vocabulary_size": 31, "num_layers": 1, "hidden_dim": 16, "intermediate_dim": 24}
GROUPED = {**SIZE, "num_query_heads": 4, "num_key_value_heads": 2}
# Every family of decoders that KerasHub 0.32 exports and that fits a tiny text model.
DECODERS = {
    "gpt2": ("GPT2Backbone", {**SIZE, "num_heads": 4, "max_sequence_length": 6, "dropout": 0.0}),
    "llama3": ("Llama3Backbone", GROUPED),
    "mistral": ("MistralBackbone", GROUPED),
    "qwen2": ("QwenBackbone", GROUPED),
    # Its exporter takes one key and value head, as in the smaller Gemma.
    "gemma": ("GemmaBackbone", {**GROUPED, "num_key_value_heads": 1, "head_dim": 4}),
}


def inputs(model):
    ids = np.random.default_rng(0).integers(1, 31, size=(3, 6)).astype("int32")
    found = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    if "segment_ids" in model.input:
        found["segment_ids"] = np.zeros_like(ids)
    return found


def hidden(backbone):
    outputs = backbone.predict(inputs(backbone), verbose=0)
    return outputs["sequence_output"] if isinstance(outputs, dict) else outputs


def bert():
    return keras_hub.models.BertBackbone(**SIZE, num_heads=4, max_sequence_length=6, dropout=0.0)


def merged(backbone):
    """Returns a merged backbone and its outputs from before merging, which moved the kernels."""
    randomize(backbone.weights, seed=3, scale=0.3)
    before = snapshot(backbone.weights)
    klp.enable_lora_plus(backbone, rank=2, targets="all-linear")
    randomize_factors(backbone)
    expected = hidden(backbone)
    klp.merge_lora_plus(backbone)
    moved = [
        relative_error(now, then)
        for now, then in zip(snapshot(backbone.weights), before, strict=True)
    ]
    assert sum(error > 0.1 for error in moved) >= 6
    return backbone, expected


def test_a_preset_of_a_merged_backbone(tmp_path):
    backbone, expected = merged(bert())
    backbone.save_to_preset(str(tmp_path / "preset"))
    twin = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    assert type(twin) is keras_hub.models.BertBackbone
    assert_close(hidden(twin), expected, FLOAT32_MODEL)


def test_a_preset_of_a_merged_task(tmp_path):
    backbone = bert()
    task = keras_hub.models.BertTextClassifier(backbone, num_classes=3, preprocessor=None)
    randomize(task.weights, seed=3, scale=0.3)
    klp.enable_lora_plus(task, rank=2)
    randomize_factors(task)
    x = inputs(backbone)
    expected = task.predict(x, verbose=0)
    klp.merge_lora_plus(task)
    task.save_to_preset(str(tmp_path / "preset"))
    twin = keras_hub.models.TextClassifier.from_preset(str(tmp_path / "preset"), preprocessor=None)
    assert_close(twin.predict(x, verbose=0), expected, FLOAT32_MODEL)


@pytest.mark.parametrize("name", DECODERS)
def test_transformers_reads_a_merged_decoder(name, tmp_path):
    """The oracle is transformers on torch, whatever the backend here is."""
    import torch
    import transformers

    class_name, arguments = DECODERS[name]
    backbone, expected = merged(getattr(keras_hub.models, class_name)(**arguments))
    backbone.export_to_transformers(str(tmp_path))
    model = transformers.AutoModel.from_pretrained(str(tmp_path)).eval()
    x = inputs(backbone)
    with torch.no_grad():
        found = model(
            input_ids=torch.tensor(x["token_ids"]).long(),
            attention_mask=torch.tensor(x["padding_mask"]).long(),
        ).last_hidden_state
    assert_close(found.cpu().numpy(), expected, FLOAT32_MODEL)


@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter:DeprecationWarning")
def test_export_of_a_merged_backbone(tmp_path, backend):
    backbone, expected = merged(bert())
    x = inputs(backbone)
    # Fixed shapes: JAX cannot compare a symbolic length with that of a position embedding.
    signature = {
        name: keras.InputSpec(shape=value.shape, dtype=value.dtype, name=name)
        for name, value in x.items()
    }
    if backend == "torch":
        import torch

        path = str(tmp_path / "model.pt2")
        backbone.export(path, format="torch", verbose=False, input_signature=[signature])
        loaded = torch.export.load(path).module()
        found = loaded({name: torch.tensor(value) for name, value in x.items()})
        found = {name: value.detach().numpy() for name, value in found.items()}
    else:
        import tensorflow as tf

        path = str(tmp_path / "model")
        backbone.export(path, format="tf_saved_model", verbose=False, input_signature=[signature])
        loaded = tf.saved_model.load(path)
        found = loaded.serve(x)
    assert_close(np.asarray(found["sequence_output"]), expected, FLOAT32_MODEL)
