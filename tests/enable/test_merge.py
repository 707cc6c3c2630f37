"""Rule 9, K15: merging leaves a plain model with the same outputs, also in old traces."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from lora_cases import ONE_OF_EACH, all_factors, ids, randomize, randomize_factors, snapshot
from tiny_models import (
    CLASSES,
    MODELS,
    compile_model,
    features,
    fit,
    functional,
    nested,
    normalised,
)
from tolerances import BFLOAT16, FLOAT16, FLOAT32_LAYER, FLOAT32_MODEL, assert_close, relative_error

import keras_loraplus as klp


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def flags(model):
    """Returns everything that says what trains: classes, flags, variable lists and their order."""
    return [
        (
            type(layer),
            layer.trainable,
            [(v.path, v.trainable) for v in layer.trainable_variables],
            [(v.path, v.trainable) for v in layer.non_trainable_variables],
            [v.path for v in layer.weights],
            sorted(k for k in vars(layer) if "lora" in k or "adapter" in k or "adoption" in k),
        )
        for layer in model._flatten_layers()
    ]


def without_native(found):
    """Leaves out what Keras itself sets on layers that know its own LoRA."""
    own = {"lora_enabled", "lora_rank", "lora_alpha"}
    return [(*row[:-1], [k for k in row[-1] if k not in own]) for row in found]


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids(ONE_OF_EACH))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_layer_is_the_plain_layer(case, dtype):
    options = {"reverse_dtype": None} if "reverse_dtype" in case.arguments else {}
    layer = case.make_plain(dtype=dtype, **options)
    kernels = [to_numpy(v).copy() for v in layer.weights]
    case.lora.from_layer(layer, rank=3, alpha=5.0)
    randomize_factors(layer)
    expected = to_numpy(case.call(layer)).astype("float64")
    assert klp.merge_lora_plus(layer) is layer
    assert type(layer) is case.plain
    assert any(
        not np.array_equal(to_numpy(v), old) for v, old in zip(layer.weights, kernels, strict=True)
    )
    tolerance = FLOAT32_LAYER if dtype == "float32" else 0.05
    assert_close(to_numpy(case.call(layer)).astype("float64"), expected, tolerance)


@pytest.mark.parametrize("frozen", [(), ("first",), ("second", "head"), ("conv", "batch_norm")])
@pytest.mark.parametrize("name", MODELS)
def test_merging_restores_classes_flags_and_lists(name, frozen):
    make, inputs = MODELS[name]
    model = make()
    for layer in model._flatten_layers():
        if layer.name in frozen:
            layer.trainable = False
    before = without_native(flags(model))
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    expected = to_numpy(model(inputs()))
    klp.merge_lora_plus(model)
    assert without_native(flags(model)) == before
    assert_close(to_numpy(model(inputs())), expected, FLOAT32_MODEL)
    assert not any("lora" in v.path for v in model.variables)


@pytest.mark.parametrize("inner_first", [False, True])
def test_a_compiled_parent_needs_no_new_trace(inner_first):
    model = nested()
    part = (
        model
        if not inner_first
        else next(la for la in model.layers if la.count_params() and isinstance(la, keras.Model))
    )
    base = to_numpy(model(features()))
    klp.enable_lora_plus(part, rank=2, targets=["first"] if inner_first else None)
    randomize_factors(model)
    outer_in = keras.Input((6,))
    outer = keras.Model(outer_in, model(outer_in) * 2.0)
    compile_model(outer)
    before = outer.predict(features(), verbose=0)
    assert relative_error(before, 2 * base) > 1e-2
    loss = outer.evaluate(features(), np.zeros(12), verbose=0)
    traced = outer.predict_function
    klp.merge_lora_plus(part)
    assert outer.predict_function is traced
    after = outer.predict(features(), verbose=0)
    assert_close(after, before, FLOAT32_MODEL)
    assert_close(to_numpy(outer(features())), before, FLOAT32_MODEL)
    assert outer.evaluate(features(), np.zeros(12), verbose=0) == pytest.approx(loss, rel=1e-5)
    assert not any("lora" in v.path for v in model.variables)
    with pytest.raises(ValueError, match="no LoRA\\+ adapters"):
        klp.merge_lora_plus(part)
    assert_close(outer.predict(features(), verbose=0), before, FLOAT32_MODEL)


def test_a_merged_model_asks_for_compile_and_trains():
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    compile_model(model, klp.LoRAPlusAdamW(1e-2))
    fit(model, features())
    expected = to_numpy(model(features()))
    klp.merge_lora_plus(model)
    assert_close(model.predict(features(), verbose=0), expected, FLOAT32_MODEL)
    with pytest.raises(ValueError, match="compile"):
        fit(model, features())
    compile_model(model)
    before = snapshot(model.trainable_variables)
    assert len(before) == 6
    fit(model, features())
    for variable, value in zip(model.trainable_variables, before, strict=True):
        assert not np.array_equal(to_numpy(variable), value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_factors_that_are_not_finite_are_refused(bad):
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    second = model.get_layer("second")
    value = to_numpy(second.lora_kernel_a).copy()
    value[0, 0] = bad
    second.lora_kernel_a.assign(value)
    classes = flags(model)
    before = snapshot(model.weights)
    with pytest.raises(ValueError, match="NaN or infinity") as error:
        klp.merge_lora_plus(model)
    assert "second" in str(error.value) and "lora_kernel_a" in str(error.value)
    assert flags(model) == classes
    for variable, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), old)


def test_merging_a_loaded_model(tmp_path):
    model = normalised()
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    inputs = MODELS["normalised"][1]()
    expected = to_numpy(model(inputs))
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    klp.merge_lora_plus(twin)
    assert type(twin.get_layer("hidden")) is keras.layers.Dense
    assert_close(to_numpy(twin(inputs)), expected, FLOAT32_MODEL)
    hidden = twin.get_layer("hidden")
    hidden.trainable = True
    assert [v.name for v in hidden.trainable_variables] == ["kernel", "bias"]


def test_enabling_again_after_merging():
    model = functional()
    for _ in range(2):
        before = to_numpy(model(features()))
        klp.enable_lora_plus(model, rank=2)
        np.testing.assert_array_equal(to_numpy(model(features())), before)
        randomize_factors(model)
        expected = to_numpy(model(features()))
        klp.merge_lora_plus(model)
        assert_close(to_numpy(model(features())), expected, FLOAT32_MODEL)
    assert all_factors(model) == []


LOAD_WITHOUT = """
import sys
sys.modules["keras_loraplus"] = None
import keras, numpy as np
try:
    import keras_loraplus
except ImportError:
    pass
else:
    raise SystemExit("keras_loraplus is importable")
model = keras.saving.load_model(sys.argv[1])
np.save(sys.argv[3], model.predict(np.load(sys.argv[2]), verbose=0))
assert type(model.layers[-1]).__module__.startswith("keras.src")
"""


@pytest.mark.parametrize("name", ["normalised", "text"])
def test_a_merged_file_loads_without_this_package(name, tmp_path):
    make, inputs = MODELS[name]
    model = make()
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    expected = to_numpy(model(inputs()))
    klp.merge_lora_plus(model)
    model.save(tmp_path / "merged.keras")
    np.save(tmp_path / "x.npy", inputs())
    names = [str(tmp_path / n) for n in ("merged.keras", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", LOAD_WITHOUT, *names], check=True, cwd=tmp_path)
    assert_close(np.load(tmp_path / "y.npy"), expected, FLOAT32_MODEL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_sum_is_formed_in_float32(dtype):
    """One rounding, to the kernel's own dtype: not one of A B, and another of the sum."""
    layer = keras.layers.Dense(40, dtype=dtype)
    layer.build((None, 30))
    randomize([layer.kernel], seed=2, scale=1.0)
    kernel = to_numpy(layer.kernel).astype("float64")
    klp.layers.LoRAPlusDense.from_layer(layer, rank=3, alpha=5.0)
    randomize_factors(layer)
    a, b = (to_numpy(v).astype("float64") for v in layer.adapter_variables().values())
    klp.merge_lora_plus(layer)
    merged = kernel + 5.0 / 3.0 * a @ b
    expected = keras.ops.cast(keras.ops.convert_to_tensor(merged.astype("float32")), dtype)
    found = to_numpy(layer.kernel).astype("float64")
    expected = to_numpy(expected).astype("float64")
    assert np.abs(expected - kernel).max() > 0.1
    if dtype == "float32":
        assert_close(found, expected, FLOAT32_LAYER)
    else:  # float32 rounding decides ties of the short dtypes now and then
        assert np.mean(found != expected) < 0.01
        assert_close(found, expected, BFLOAT16 if dtype == "bfloat16" else FLOAT16)


def test_what_the_dtype_of_the_kernel_cannot_hold_is_refused():
    """float16 ends at 65504: finite factors, and a sum that would be infinite."""
    layer = keras.layers.Dense(4, dtype="float16")
    layer.build((None, 3))
    klp.layers.LoRAPlusDense.from_layer(layer, rank=1)
    before = to_numpy(layer.kernel).copy()
    for variable in layer.adapter_variables().values():
        variable.assign(keras.ops.full(variable.shape, 300.0))
    with pytest.raises(ValueError, match="NaN or infinity") as error:
        klp.merge_lora_plus(layer)
    assert "'lora_kernel_a': True, 'lora_kernel_b': True" in str(error.value)
    np.testing.assert_array_equal(to_numpy(layer.kernel), before)
    assert klp.layers.is_adapted(layer)


@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter:DeprecationWarning")
def test_export_of_a_merged_model(tmp_path, backend):
    """`model.export` writes a SavedModel or a torch program; both read the merged kernels."""
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    expected = to_numpy(model(features()))
    klp.merge_lora_plus(model)
    if backend == "torch":
        import torch

        signature = [keras.InputSpec(shape=features().shape, dtype="float32")]
        path = str(tmp_path / "saved.pt2")
        model.export(path, format="torch", verbose=False, input_signature=signature)
        served = torch.export.load(path).module()(torch.tensor(features())).detach().numpy()
    else:
        import tensorflow as tf

        model.export(tmp_path / "saved", format="tf_saved_model", verbose=False)
        loaded = tf.saved_model.load(tmp_path / "saved")
        served = np.asarray(loaded.serve(features()))
    assert served.shape == (12, CLASSES)
    assert_close(served, expected, FLOAT32_MODEL)
