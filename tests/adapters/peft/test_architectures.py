"""PEFT folders against real transformers and peft, both ways, on ten architectures (F05, F10)."""

import peft
import pytest
from hugging_face_cases import (
    CASES,
    inputs,
    keras_output,
    load_keras,
    load_transformers,
    random_peft,
    save_random,
    transformers_output,
)
from lora_cases import randomize_factors
from tolerances import HUB_AGAINST_TRANSFORMERS, assert_close, relative_error

import keras_loraplus as klp

MOVED = 1e-2

# peft 0.21.2 reads an attribute that transformers 5.24 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, tmp_path_factory):
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    save_random(case, folder)
    return case, folder


def test_ours_gives_the_same_outputs_in_transformers(checkpoint, tmp_path):
    case, folder = checkpoint
    backbone, values = load_keras(folder), inputs(case)
    base = keras_output(case, backbone, values)
    assert_close(
        base,
        transformers_output(case, load_transformers(case, folder), values),
        HUB_AGAINST_TRANSFORMERS,
    )
    klp.enable_lora_plus(backbone, rank=2, alpha=3, targets=list(case.keras_targets))
    randomize_factors(backbone)
    ours = keras_output(case, backbone, values)
    assert relative_error(ours, base) > MOVED
    klp.export_peft(backbone, tmp_path, str(folder), prefix=case.prefix)
    model = peft.PeftModel.from_pretrained(load_transformers(case, folder), str(tmp_path)).eval()
    assert_close(transformers_output(case, model, values), ours, HUB_AGAINST_TRANSFORMERS)


def test_peft_gives_the_same_outputs_here(checkpoint, tmp_path):
    case, folder = checkpoint
    values = inputs(case)
    wrapped = random_peft(load_transformers(case, folder), case)
    expected = transformers_output(case, wrapped, values)
    wrapped.save_pretrained(tmp_path)
    backbone = load_keras(folder)
    base = keras_output(case, backbone, values)
    klp.import_peft(backbone, tmp_path, checkpoint=folder)
    ours = keras_output(case, backbone, values)
    assert relative_error(ours, base) > MOVED
    assert_close(ours, expected, HUB_AGAINST_TRANSFORMERS)
