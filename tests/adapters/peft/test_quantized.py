"""PEFT folders of adapters beside quantized kernels: A and B as usual, both ways."""

import json

import keras
import numpy as np
import pytest
from hugging_face_cases import CASES, inputs, keras_output, load_keras
from lora_cases import all_factors, randomize_factors
from quantized_cases import MODES
from safetensors.numpy import load_file

import keras_loraplus as klp

CASE = CASES["bert"]
pytestmark = pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")


def adapted(folder, mode=None):
    backbone = load_keras(folder)
    if mode is not None:
        backbone.quantize(config=MODES[mode][0]())
    targets = ["query", "attention_output", "token_embedding"]
    klp.enable_lora_plus(backbone, rank=3, alpha=5, targets=targets)
    randomize_factors(backbone)
    return backbone


@pytest.mark.parametrize("mode", ["int4-blocks"])
def test_a_quantized_base_writes_and_reads_what_a_float_one_does(bert, tmp_path, mode):
    plain, packed = adapted(bert), adapted(bert, mode)
    classes = [type(layer) for layer in packed._flatten_layers()]
    for name, model in (("plain", plain), ("packed", packed)):
        klp.export_peft(model, tmp_path / name, str(bert))
    assert [type(layer) for layer in packed._flatten_layers()] == classes
    right, found = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "packed")
    )
    assert found.keys() == right.keys() and len(found) == 10
    for key, value in right.items():
        np.testing.assert_array_equal(found[key], value)
    texts = [(tmp_path / n / "adapter_config.json").read_text() for n in ("plain", "packed")]
    assert json.loads(texts[0]) == json.loads(texts[1])
    expected = keras_output(CASE, packed, inputs(CASE))
    other = load_keras(bert)
    other.quantize(config=MODES[mode][0]())
    klp.import_peft(other, tmp_path / "packed", checkpoint=str(bert))
    for variable, value in zip(all_factors(other), all_factors(packed), strict=True):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(variable), keras.ops.convert_to_numpy(value)
        )
    np.testing.assert_array_equal(keras_output(CASE, other, inputs(CASE)), expected)
