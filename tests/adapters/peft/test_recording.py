"""What is learned from a converter's hooks, and that nothing is changed by asking."""

import keras_hub
import numpy as np
import pytest
from adapter_cases import assert_unchanged, values
from hugging_face_cases import CASES, load_keras, save_random

import keras_loraplus as klp
from keras_loraplus.adapters.peft.checkpoint import read_checkpoint
from keras_loraplus.adapters.peft.recording import _learned, _positions, record


def learned(hook, shape=(4, 3)):
    return _learned(_positions((3, 4)), hook, shape)


def test_permutations_reshapes_and_roundings_are_learned():
    index, fault = learned(lambda w, shape: np.reshape(np.transpose(w), shape).astype(np.float16))
    assert fault is None
    assert (index == np.arange(12).reshape(3, 4).T).all()


@pytest.mark.parametrize(
    ("hook", "why"),
    [
        (lambda w, _: w.T + 1, "more than permute"),
        (lambda w, _: np.tile(w[:1], (4, 1))[:, :3], "repeats"),
        (lambda w, _: w, "shape"),
        (lambda w, _: np.zeros((4, 3)), "computes"),
    ],
)
def test_anything_else_is_a_fault(hook, why):
    index, fault = learned(hook)
    assert index is None and why in fault


def test_recording_changes_nothing(bert):
    backbone = load_keras(bert)
    before = values(backbone)
    sources = record(backbone, read_checkpoint(bert))
    assert_unchanged(backbone, before)
    keys = {source.key for source in sources.values()}
    assert keys == set(read_checkpoint(bert).shapes)
    assert len(sources) == len(backbone.weights)


def test_a_tied_embedding_of_a_language_model_is_refused(tmp_path):
    """Its adapter would act in the logits here and not in PEFT."""
    save_random(CASES["gemma"], tmp_path / "gemma")
    task = keras_hub.models.GemmaCausalLM(
        backbone=load_keras(tmp_path / "gemma"), preprocessor=None
    )
    klp.enable_lora_plus(task, rank=2, targets=["query", "token_embedding"])
    with pytest.raises(ValueError, match="acts in the logits too"):
        klp.export_peft(task, tmp_path / "out", str(tmp_path / "gemma"))
    assert not (tmp_path / "out").exists()
    backbone = load_keras(tmp_path / "gemma")
    klp.enable_lora_plus(backbone, rank=2, targets=["query", "token_embedding"])
    klp.export_peft(backbone, tmp_path / "out", str(tmp_path / "gemma"))
    other = keras_hub.models.GemmaCausalLM(
        backbone=load_keras(tmp_path / "gemma"), preprocessor=None
    )
    before = values(other)
    with pytest.raises(ValueError, match="acts in the logits too"):
        klp.import_peft(other, tmp_path / "out")
    assert_unchanged(other, before)
