"""What `export_peft` writes, by formula and in transformers."""

import json

import keras
import keras_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from hugging_face_cases import (
    CASES,
    inputs,
    keras_output,
    load_keras,
    load_transformers,
    transformers_output,
)
from lora_cases import randomize, randomize_factors
from safetensors.numpy import load_file
from tolerances import FLOAT32, HUB_AGAINST_TRANSFORMERS, assert_close, relative_error

import keras_loraplus as klp

CASE = CASES["bert"]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def in_transformers(folder, adapter, case=CASE):
    model = peft.PeftModel.from_pretrained(load_transformers(case, folder), str(adapter)).eval()
    return transformers_output(case, model, inputs(case))


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_the_product_is_the_delta_of_the_kernel(bert, tmp_path, scaling):
    """F05: B A alpha/r in numpy against what merging adds, in the layout of the checkpoint."""
    backbone = load_keras(bert)
    klp.enable_lora_plus(backbone, rank=3, alpha=5, scaling=scaling, targets=["query"])
    randomize_factors(backbone)
    klp.export_peft(backbone, tmp_path, str(bert))
    config, tensors = read(tmp_path)
    assert config["use_rslora"] == (scaling == "rslora")
    assert (config["r"], config["lora_alpha"]) == (3, 5)
    divisor = 3 if scaling == "standard" else 3**0.5
    layers = [backbone.get_layer(f"transformer_layer_{i}")._self_attention_layer for i in (0, 1)]
    before = [keras.ops.convert_to_numpy(layer.query_dense.kernel) for layer in layers]
    klp.merge_lora_plus(backbone)
    for i, layer in enumerate(layers):
        name = f"base_model.model.encoder.layer.{i}.attention.self.query"
        b, a = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
        product = b.astype("float64") @ a * 5 / divisor
        delta = keras.ops.convert_to_numpy(layer.query_dense.kernel).astype("float64") - before[i]
        assert np.abs(product).max() > 0.1
        # The merged kernel is rounded to float32.
        assert_close(product, delta.reshape(16, 16).T, 10 * FLOAT32)
    assert len(tensors) == 4


def test_patterns_embeddings_room_and_norms(bert, tmp_path):
    backbone = load_keras(bert)
    before = keras_output(CASE, backbone, inputs(CASE))
    klp.enable_lora_plus(
        backbone,
        rank=2,
        targets=["query", "value", "token_embedding", ".*_layer_0/feedforward_output_dense"],
        rank_pattern={"value": 3},
        alpha_pattern={"token_embedding": 7},
        max_rank=4,
        trainable=[".*layer_0/feedforward_layer_norm/.*"],
    )
    # Padding stays zero: only what is within the rank is filled.
    for layer in backbone._flatten_layers():
        if hasattr(layer, "adapter_variables"):
            for name, factor in layer.factors().items():
                value = np.random.default_rng(4).normal(size=factor.shape).astype("float32")
                layer.adapter_variables()[name].assign(factor.padded(value, 4))
    norms = [v for v in backbone.trainable_variables if "layer_norm" in v.path]
    assert len(norms) == 2
    randomize(norms, seed=9)
    klp.export_peft(backbone, tmp_path, str(bert))
    config, tensors = read(tmp_path)
    assert config["modules_to_save"] == ["encoder.layer.0.output.LayerNorm"]
    assert tensors["base_model.model.embeddings.word_embeddings.lora_embedding_A"].shape == (2, 40)
    ours = keras_output(CASE, backbone, inputs(CASE))
    assert relative_error(ours, before) > 1e-2
    assert_close(in_transformers(bert, tmp_path), ours, HUB_AGAINST_TRANSFORMERS)
    again = load_keras(bert)
    klp.import_peft(again, tmp_path)
    assert_close(keras_output(CASE, again, inputs(CASE)), ours, 10 * FLOAT32)
    assert len(again.trainable_variables) == len(backbone.trainable_variables)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_trained_biases_of_adapted_layers(request, name, tmp_path):
    """As PEFT's own: of all adapted modules, GPT-2's fused one included."""
    folder, case = request.getfixturevalue(name), CASES[name]
    backbone = load_keras(folder)
    klp.enable_lora_plus(
        backbone, rank=2, targets=["query", "value"], trainable=[".*layer_0.*query/bias"]
    )
    randomize_factors(backbone)
    biases = [v for v in backbone.trainable_variables if v.name == "bias"]
    assert len(biases) == 1
    without = keras_output(case, backbone, inputs(case))
    randomize(biases, seed=9)
    ours = keras_output(case, backbone, inputs(case))
    assert relative_error(ours, without) > 1e-2
    klp.export_peft(backbone, tmp_path, str(folder))
    config, tensors = read(tmp_path)
    assert config["bias"] == "lora_only"
    modules = {"bert": 4, "gpt2": 2}[name]
    assert sum(key.endswith(".base_layer.bias") for key in tensors) == modules
    assert_close(in_transformers(folder, tmp_path, case), ours, HUB_AGAINST_TRANSFORMERS)
    again = klp.import_peft(load_keras(folder), tmp_path)
    assert_close(keras_output(case, again, inputs(case)), ours, 10 * FLOAT32)


def test_layers_of_one_module_with_different_scales_are_joined(gpt2, tmp_path):
    case = CASES["gpt2"]
    backbone = load_keras(gpt2)
    klp.enable_lora_plus(
        backbone, rank=2, targets=["query", "value"], rank_pattern={"value": 3}, alpha=5
    )
    randomize_factors(backbone)
    klp.export_peft(backbone, tmp_path, str(gpt2))
    config, _ = read(tmp_path)
    assert config["r"] == 5 and config["fan_in_fan_out"] is True
    ours = keras_output(case, backbone, inputs(case))
    assert_close(in_transformers(gpt2, tmp_path, case), ours, HUB_AGAINST_TRANSFORMERS)


def test_a_task_with_its_head(bert, tmp_path):
    task = keras_hub.models.BertTextClassifier(
        backbone=load_keras(bert), num_classes=3, preprocessor=None, dropout=0.0
    )
    klp.enable_lora_plus(task, rank=2)
    randomize(task.trainable_variables, seed=5)
    with pytest.raises(ValueError, match="logits/kernel was trained.*modules_to_save"):
        klp.export_peft(task, tmp_path / "refused", str(bert))
    assert not (tmp_path / "refused").exists()
    folder = tmp_path / "peft"
    heads = {"classifier": "logits"}
    klp.export_peft(task, folder, str(bert), prefix="bert.", modules_to_save=heads)
    ids = inputs(CASE)
    fields = {"token_ids": ids, "padding_mask": np.ones_like(ids), "segment_ids": 0 * ids}
    ours = keras.ops.convert_to_numpy(task(fields))
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification.from_pretrained(bert, num_labels=3)
    model = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        logits = model(torch.tensor(ids.astype("int64"))).logits.numpy()
    assert_close(logits, ours, HUB_AGAINST_TRANSFORMERS)
    again = keras_hub.models.BertTextClassifier(
        backbone=load_keras(bert), num_classes=3, preprocessor=None, dropout=0.0
    )
    klp.import_peft(again, folder, modules_to_save=heads)
    assert_close(keras.ops.convert_to_numpy(again(fields)), ours, 10 * FLOAT32)


def test_refusals_write_nothing(bert, tmp_path):
    backbone = load_keras(bert)
    with pytest.raises(ValueError, match="no LoRA"):
        klp.export_peft(backbone, tmp_path / "out", str(bert))
    klp.enable_lora_plus(backbone, rank=2, targets=["query"])
    with pytest.raises(ValueError, match="checkpoint='FOLDER'"):
        klp.export_peft(backbone, tmp_path / "out", "some/model")
    with pytest.raises(ValueError, match="KerasHub backbones and tasks"):
        klp.export_peft(keras.Sequential([keras.layers.Dense(2)]), tmp_path / "out", str(bert))
    assert not (tmp_path / "out").exists()
