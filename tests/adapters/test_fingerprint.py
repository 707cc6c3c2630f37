"""The fingerprint of the base: a few hundred numbers of each adapted matrix, read by slice."""

import math

import keras
import numpy as np
import pytest
from adapter_cases import perturb, small_model

import keras_loraplus as klp
from keras_loraplus.adapters import files, fingerprint

SHAPES = [(4096, 4096), (384, 12, 32), (12, 32, 384), (30522, 384), (3, 3, 16, 32), (5, 7), (3,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slices_lie_inside_and_reach_both_ends_of_every_axis(shape):
    starts, size = fingerprint.slices(shape)
    assert len(set(starts)) == len(starts)
    for start in starts:
        assert all(0 <= s and s + n <= axis for s, n, axis in zip(start, size, shape, strict=True))
    assert starts[0] == (0,) * len(shape)
    ends = tuple(s + n for s, n in zip(starts[-1], size, strict=True))
    assert ends == shape or len(starts) == 1
    if math.prod(shape) >= 5000:
        assert len(starts) * math.prod(size) == 200


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_no_more_than_a_slice_leaves_the_device(shape, monkeypatch):
    kernel = keras.Variable(np.ones(shape, "float32"))
    sizes = []

    def read(tensor):
        sizes.append(math.prod(tensor.shape))
        return np.asarray(keras.ops.convert_to_numpy(tensor))

    class Ops:
        """`keras.ops`, and a record of what is fetched."""

        def __getattr__(self, name):
            return read if name == "convert_to_numpy" else getattr(keras.ops, name)

    monkeypatch.setattr(fingerprint, "ops", Ops())
    fingerprint.fingerprint(kernel)
    assert sizes == [25] * 8


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tolerance_is_by_dtype(dtype):
    """A base that was rounded to another dtype is the same base; one that was changed is not."""
    value = np.random.default_rng(0).normal(size=(40, 50)).astype("float32")
    saved = fingerprint.fingerprint(keras.Variable(value, dtype="float32"))
    rounded = keras.Variable(value, dtype=dtype)
    assert fingerprint.differs(rounded, saved) is None
    assert fingerprint.differs(keras.Variable(value), fingerprint.fingerprint(rounded)) is None
    moved = keras.Variable(value * np.float32(1.05), dtype=dtype)
    assert fingerprint.differs(moved, saved) == "other values"
    assert fingerprint.differs(keras.Variable(value.T), saved) == "shape (50, 40), was (40, 50)"


def test_numbers_that_float16_does_not_hold_are_left_out():
    value = np.full((30, 30), 1e6, "float32")
    value[0] = 1.0
    saved = fingerprint.fingerprint(keras.Variable(value))
    assert fingerprint.differs(keras.Variable(value), saved) is None
    value[0] = 2.0
    assert fingerprint.differs(keras.Variable(value), saved) == "other values"


def test_a_quantized_base_is_noted_and_no_warning(saved, capsys):
    _, path = saved
    content = files.read(path)
    for record in content.base.values():
        record["dtype"] = "int8"
    files.write(path, content)
    klp.load_adapter(small_model(seed=9), path)  # other values, which nobody can compare
    said = capsys.readouterr().out
    assert "frozen weights of dtype int8" in said and "are float32" in said
    assert said.count("\n") == 1
    keras.config.disable_interactive_logging()
    try:
        klp.load_adapter(small_model(seed=9), path)
    finally:
        keras.config.enable_interactive_logging()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("targets", [None, "all-linear", [".*dense", "dense_1"]])
def test_targets_come_back(tmp_path, targets):
    model = small_model()
    klp.enable_lora_plus(model, rank=2, targets=targets)
    perturb(model)
    path = klp.save_adapter(model, tmp_path / "a.safetensors")
    assert klp.inspect_adapter(path).targets == targets
    twin = klp.load_adapter(small_model(), path)
    again = klp.save_adapter(twin, tmp_path / "b.safetensors")
    assert klp.inspect_adapter(again).targets == targets
    klp.merge_lora_plus(twin)
    klp.enable_lora_plus(twin, rank=2, targets=".*dense.*")
    assert klp.inspect_adapter(klp.save_adapter(twin, path)).targets == ".*dense.*"


def test_targets_of_a_task_are_those_of_its_backbone(tmp_path):
    """Where the whole is saved, what a part was enabled with is found."""
    part = small_model()
    klp.enable_lora_plus(part, rank=2, targets=["dense"])
    outer = keras.Sequential([keras.Input((5,)), part])
    path = klp.save_adapter(outer, tmp_path / "a.safetensors")
    assert klp.inspect_adapter(path).targets == ["dense"]
