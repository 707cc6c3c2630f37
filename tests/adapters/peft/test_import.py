"""What `import_peft` takes and what it refuses, with nothing changed (F07)."""

import json

import keras
import numpy as np
import pytest
from adapter_cases import assert_unchanged, values
from hugging_face_cases import (
    CASES,
    inputs,
    keras_output,
    load_keras,
    load_transformers,
    random_peft,
    transformers_output,
)
from lora_cases import randomize_factors
from safetensors.numpy import load_file, save_file
from tolerances import EXACT, FLOAT32, HUB_AGAINST_TRANSFORMERS, assert_close, relative_error

import keras_loraplus as klp

CASE = CASES["bert"]
QUERY = "base_model.model.encoder.layer.0.attention.self.query"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def exported(bert, tmp_path):
    """A PEFT folder of ours, and the outputs of the model it came from."""
    backbone = load_keras(bert)
    klp.enable_lora_plus(backbone, rank=2, alpha=3, targets=["query", "value"])
    randomize_factors(backbone)
    klp.export_peft(backbone, tmp_path / "peft", str(bert))
    return tmp_path / "peft", keras_output(CASE, backbone, inputs(CASE))


def change_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def refused(bert, folder, match, enabled=False):
    backbone = load_keras(bert)
    if enabled:
        klp.enable_lora_plus(backbone, rank=4, targets=["query"])
    before = values(backbone)
    trainable = [variable.path for variable in backbone.trainable_variables]
    with pytest.raises(ValueError, match=match):
        klp.import_peft(backbone, folder, checkpoint=bert)
    assert_unchanged(backbone, before)
    assert [variable.path for variable in backbone.trainable_variables] == trainable


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unknown_neutral_fields_are_ignored(bert, exported, value):
    folder, expected = exported
    change_config(folder, a_field_of_the_future=value)
    backbone = klp.import_peft(load_keras(bert), folder)
    assert_close(keras_output(CASE, backbone, inputs(CASE)), expected, 10 * FLOAT32)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"a_field_of_the_future": 1},
        {"a_field_of_the_future": 0},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"bias": "lora_only"},  # which the folder does not hold
        {"bias": "boft_only"},
        {"peft_type": "IA3"},
        {"r": 0},
        {"lora_alpha": "much"},
        {"rank_pattern": {"(": 3}},
        {"lora_dropout": 1.5},
        {"layer_replication": [[0, 1]]},
    ],
    ids=str,
)
def test_fields_with_a_meaning_of_their_own_are_refused(bert, exported, fields):
    folder, _ = exported
    change_config(folder, **fields)
    refused(bert, folder, next(iter(fields)))


def test_every_fault_is_listed_in_one_error(bert, exported):
    folder, _ = exported

    def damage(tensors):
        del tensors[f"{QUERY}.lora_B.weight"]
        value = QUERY.replace("query", "value")
        tensors[f"{value}.lora_A.weight"] = np.zeros((2, 17), "float32")
        last = QUERY.replace("layer.0", "layer.1")
        tensors[f"{last}.lora_A.weight"][0, 0] = np.nan
        for side in "AB":
            del tensors[f"{last.replace('query', 'value')}.lora_{side}.weight"]
        tensors["base_model.model.elsewhere.lora_A.weight"] = np.zeros((2, 16), "float32")

    change_tensors(folder, damage)
    backbone = load_keras(bert)
    before = values(backbone)
    with pytest.raises(ValueError) as caught:
        klp.import_peft(backbone, folder)
    pair = "missing: encoder.layer.1.attention.self.value"
    for text in ("missing: B of", pair, "shape: ", "not finite: ", "unexpected: elsewhere"):
        assert text in str(caught.value)
    assert_unchanged(backbone, before)


def test_other_faults(bert, gpt2, exported):
    folder, _ = exported
    refused(bert, folder, "rank and scale", enabled=True)
    backbone = load_keras(bert)
    with pytest.raises(ValueError, match="GPT2Backbone"):
        klp.import_peft(backbone, folder, checkpoint=gpt2)
    change_config(folder, base_model_name_or_path="some/model")
    with pytest.raises(ValueError, match="checkpoint='FOLDER'"):
        klp.import_peft(backbone, folder)
    change_config(folder, modules_to_save=["pooler"])
    refused(bert, folder, "missing: pooler")
    (folder / "adapter_model.safetensors").write_bytes(b"\x10")
    refused(bert, folder, "not a whole safetensors file")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        klp.import_peft(backbone, folder, checkpoint=bert)


def test_into_an_enabled_model_with_room(bert, exported):
    folder, expected = exported
    backbone = load_keras(bert)
    klp.enable_lora_plus(backbone, rank=2, alpha=3, targets=["query", "value"], max_rank=5)
    randomize_factors(backbone, seed=77)
    klp.import_peft(backbone, folder)
    assert_close(keras_output(CASE, backbone, inputs(CASE)), expected, 10 * FLOAT32)


def test_settings_of_peft_itself(bert, tmp_path):
    settings = {
        "rank_pattern": {"query": 2, r"encoder\.layer\.1\..*value": 4},
        "alpha_pattern": {"layer.0.attention.self.value": 9},
        "use_rslora": True,
        "lora_dropout": 0.25,
        "modules_to_save": ["pooler.dense", "embeddings.LayerNorm"],
    }
    wrapped = random_peft(load_transformers(CASE, bert), CASE, **settings)
    wrapped.base_model.model.embeddings.LayerNorm.modules_to_save["default"].weight.data += 0.3
    wrapped.save_pretrained(tmp_path)
    backbone = load_keras(bert)
    before = keras_output(CASE, backbone, inputs(CASE))
    klp.import_peft(backbone, tmp_path, checkpoint=bert)
    after = keras_output(CASE, backbone, inputs(CASE))
    assert relative_error(after, before) > 1e-2
    assert_close(after, transformers_output(CASE, wrapped, inputs(CASE)), HUB_AGAINST_TRANSFORMERS)
    attention = [backbone.get_layer(f"transformer_layer_{i}")._self_attention_layer for i in (0, 1)]
    assert [layer.query_dense.adapter.rank for layer in attention] == [2, 2]
    assert [layer.value_dense.adapter.rank for layer in attention] == [3, 4]
    assert attention[0].value_dense.adapter.alpha == 9
    assert attention[0].value_dense.adapter.dropout == 0.25
    trained = {variable.path for variable in backbone.trainable_variables}
    assert {"pooled_dense/kernel", "embeddings_layer_norm/gamma"} <= trained


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_peft(bert, tmp_path, bias):
    wrapped = random_peft(load_transformers(CASE, bert), CASE, bias=bias)
    trained = {
        name: parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad and name.endswith("bias")
    }
    for parameter in trained.values():
        parameter.data += 0.3
    wrapped.save_pretrained(tmp_path)
    backbone = load_keras(bert)
    klp.import_peft(backbone, tmp_path, checkpoint=bert)
    expected = transformers_output(CASE, wrapped, inputs(CASE))
    assert_close(keras_output(CASE, backbone, inputs(CASE)), expected, HUB_AGAINST_TRANSFORMERS)
    kept = [v for v in backbone.trainable_variables if v.name in ("bias", "beta")]
    assert len(kept) == len(trained)
    for parameter in trained.values():
        parameter.data -= 0.3
    without = transformers_output(CASE, wrapped, inputs(CASE))
    assert relative_error(without, expected) > 1e-2


def test_there_and_back_is_exact(gpt2, tmp_path):
    """GPT-2's fused module comes back as three adapters of the sum of their ranks."""
    case = CASES["gpt2"]
    backbone = load_keras(gpt2)
    klp.enable_lora_plus(backbone, rank=2, targets=["query", "key", "value"])
    randomize_factors(backbone)
    klp.export_peft(backbone, tmp_path / "one", str(gpt2))
    again = klp.import_peft(load_keras(gpt2), tmp_path / "one")
    expected = keras_output(case, backbone, inputs(case))
    assert_close(keras_output(case, again, inputs(case)), expected, 10 * FLOAT32)
    layer = again.transformer_layers[0]._self_attention_layer.key_dense
    assert layer.adapter.rank == 6
    assert set(layer.adapter_variables()) == {"lora_kernel_a", "lora_kernel_b"}


def test_bfloat16_tensors_are_read(bert, exported):
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    folder, _ = exported
    path = folder / "adapter_model.safetensors"
    tensors = {key: value.to(torch.bfloat16) for key, value in load_torch(path).items()}
    save_torch(tensors, path)
    backbone = klp.import_peft(load_keras(bert), folder)
    query = backbone.get_layer("transformer_layer_0")._self_attention_layer.query_dense
    found = keras.ops.convert_to_numpy(query.lora_kernel_a)
    expected = tensors[f"{QUERY}.lora_A.weight"].float().numpy().T
    assert_close(found, expected, EXACT)
