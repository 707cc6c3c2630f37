"""K08: fit after enabling asks for compile, and an old optimizer is refused."""

import io
import zipfile

import h5py
import keras
import numpy as np
import pytest
from lora_cases import all_factors, snapshot
from tiny_models import compile_model, features, fit, functional, labels, nested

import keras_loraplus as klp


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def assert_unchanged(model, values):
    for variable, value in zip(model.weights, values, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value, err_msg=variable.path)


@pytest.mark.parametrize("optimizer", [klp.LoRAPlusAdamW, keras.optimizers.AdamW])
def test_fit_enable_fit(optimizer):
    model = functional()
    compile_model(model, optimizer(1e-3))
    fit(model, features())
    klp.enable_lora_plus(model, rank=2)
    values = snapshot(model.weights)
    for method in (model.fit, model.train_on_batch):
        with pytest.raises(ValueError, match="compile"):
            method(features(), labels())
    assert_unchanged(model, values)
    compile_model(model, klp.LoRAPlusAdamW(1e-2))
    before = snapshot(all_factors(model))
    fit(model, features(), epochs=2)
    for variable, value in zip(all_factors(model), before, strict=True):
        assert not np.array_equal(to_numpy(variable), value)


def test_compiling_with_the_old_optimizer_is_refused_before_anything_moves():
    model = functional()
    compile_model(model, klp.LoRAPlusAdamW(1e-3))
    fit(model, features())
    optimizer = model.optimizer
    klp.enable_lora_plus(model, rank=2)
    values, slots = snapshot(model.weights), snapshot(optimizer.variables)
    compile_model(model, optimizer)
    with pytest.raises(ValueError, match="optimizer"):
        fit(model, features())
    assert_unchanged(model, values)
    for variable, value in zip(optimizer.variables, slots, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)
    compile_model(model, klp.LoRAPlusAdamW(1e-3))
    fit(model, features())


def test_a_part_of_a_compiled_parent_and_the_recipe():
    """Enabling a part cannot see the parent: compile it again with a new optimizer."""
    parent = nested()
    compile_model(parent, klp.LoRAPlusAdamW(1e-2))
    fit(parent, features())
    part = next(la for la in parent.layers if isinstance(la, keras.Sequential))
    klp.enable_lora_plus(part, rank=2)
    compile_model(parent, klp.LoRAPlusAdamW(1e-2))
    before = snapshot(all_factors(parent))
    assert len(before) == 2
    fit(parent, features(), epochs=2)
    for variable, value in zip(all_factors(parent), before, strict=True):
        assert not np.array_equal(to_numpy(variable), value)


def test_predict_after_enabling_needs_no_compile():
    model = functional()
    expected = model.predict(features(), verbose=0)
    klp.enable_lora_plus(model, rank=2)
    np.testing.assert_allclose(model.predict(features(), verbose=0), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("merged", [False, True])
def test_a_file_holds_no_state_of_the_optimizer_that_is_gone(merged, tmp_path):
    model = functional()
    if merged:
        klp.enable_lora_plus(model, rank=2)
    compile_model(model, klp.LoRAPlusAdamW(1e-2))
    fit(model, features())
    model.save(tmp_path / "before.keras")
    assert entries_of_the_optimizer(tmp_path / "before.keras") > 2
    klp.merge_lora_plus(model) if merged else klp.enable_lora_plus(model, rank=2)
    assert model.optimizer is None
    model.save(tmp_path / "after.keras")
    assert entries_of_the_optimizer(tmp_path / "after.keras") == 0
    twin = keras.saving.load_model(tmp_path / "after.keras")
    expected = model.predict(features(), verbose=0)
    np.testing.assert_array_equal(twin.predict(features(), verbose=0), expected)
    with pytest.raises(ValueError, match="compile"):
        klp.assignments(model)
    compile_model(model, klp.LoRAPlusAdamW(1e-2))
    fit(model, features())


def entries_of_the_optimizer(path):
    """Counts the optimizer's arrays in a `.keras` file."""
    with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as weights:
        with h5py.File(io.BytesIO(weights.read())) as file:
            return len(file.get("optimizer/vars", ()))
