"""Whole models on quantized bases: both orders, training, files, merging (K11, K12)."""

import gc
import weakref

import keras
import numpy as np
import pytest
from autodiff import gradients
from lora_cases import all_factors, as_float64, randomize_factors, snapshot
from quantized_cases import MODES, quick_deletes
from tiny_models import compile_model, features, filled, fit, functional, labels, text, tokens
from tolerances import FLOAT32_MODEL, INT8, assert_close, relative_error

import keras_loraplus as klp

# Keras's own, for every layer of a model that has nothing to quantize.
pytestmark = pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_deletes():
        yield


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def quantized(build, mode):
    model = build()
    model.quantize(config=MODES[mode][0]())
    return model


def stored(model):
    """Returns everything but A and B of adapted layers."""
    found = [layer for layer in model._flatten_layers() if klp.layers.is_adapted(layer)]
    trained = {id(v) for layer in found for v in layer.trainable_variables}
    return [v for layer in found for v in layer.weights if id(v) not in trained]


@pytest.mark.parametrize(
    "mode, adapt_first, policy",
    [
        ("int8", False, "float32"),
        ("int4-blocks", True, "mixed_bfloat16"),
        ("int4-blocks", False, "mixed_float16"),
        ("int8", True, "bfloat16"),
    ],
)
def test_training_moves_a_and_b_alone(mode, adapt_first, policy):
    """Embedding, attention and dense layers; K11, and K05 under every policy."""
    keras.config.set_dtype_policy(policy)
    # JAX has no float16 attention on the CPU.
    build, inputs = (functional, features) if policy == "mixed_float16" else (text, tokens)
    model = build()
    if adapt_first:
        klp.enable_lora_plus(model, rank=2)
        model.quantize(config=MODES[mode][0]())
    else:
        model.quantize(config=MODES[mode][0]())
        klp.enable_lora_plus(model, rank=2)
    adapted = [layer for layer in model._flatten_layers() if klp.layers.is_adapted(layer)]
    # The table, four projections of attention, and the hidden layer.
    assert len(adapted) == (2 if build is functional else 6)
    assert {layer.quantization_mode for layer in adapted} == {mode.partition("-")[0]}
    kernels = {
        v.dtype for layer in adapted for v in stored(layer) if v.name in ("kernel", "embeddings")
    }
    assert kernels == {"int8"}
    before, watched = snapshot(stored(model)), all_factors(model)
    compile_model(model, klp.LoRAPlusAdamW(1e-2, lr_ratio=4.0, weight_decay=0.0))
    steps = [snapshot(watched)]
    for start in range(0, 20, 2):
        model.train_on_batch(inputs(20)[start : start + 2], labels(20)[start : start + 2])
        steps.append(snapshot(watched))
    pairs = list(zip(steps[:-1], steps[1:], strict=True))
    # float16 loss scaling skips steps until its scale has come down.
    applied = [
        pair for pair in pairs if any(not np.array_equal(a, b) for a, b in zip(*pair, strict=True))
    ]
    assert len(applied) >= (5 if policy == "mixed_float16" else 10)
    for old, new in applied[1:]:
        for variable, a, b in zip(watched, old, new, strict=True):
            assert not np.array_equal(a, b), variable.path
    assert {v.dtype for v in watched} == {"float32"}
    for variable, value in zip(stored(model), before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)
    optimizer = model.optimizer
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    slots = [v for v in optimizer.variables if "lora_" in v.path]
    assert len(slots) == 2 * len(watched) and {v.dtype for v in slots} == {"float32"}


def test_the_float_kernel_is_not_kept_in_memory():
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    kernels = [weakref.ref(model.get_layer(name).kernel) for name in ("first", "head")]
    model.quantize("int8")
    gc.collect()
    assert [kernel() for kernel in kernels] == [None, None]
    assert model.get_layer("first").kernel.dtype == "int8"


@pytest.mark.parametrize("mode, adapt_first", [("int8-weights", False), ("int4-blocks", True)])
def test_merging_into_float_layers_is_exact(mode, adapt_first):
    model = functional()
    if adapt_first:
        klp.enable_lora_plus(model, rank=2)
    model.quantize(config=MODES[mode][0]())
    if not adapt_first:
        klp.enable_lora_plus(model, rank=2)
    base = to_numpy(model(features()))
    randomize_factors(model)
    expected = to_numpy(model(features()))
    assert klp.merge_lora_plus(model, dequantize=True) is model
    assert_close(to_numpy(model(features())), expected, FLOAT32_MODEL)
    assert relative_error(base, expected) > 5e-2
    first = model.get_layer("first")
    assert type(first) is keras.layers.Dense and first.quantization_mode is None
    assert first.dtype_policy.name == "float32" and first.kernel.dtype == "float32"
    assert [v.name for v in first.trainable_variables] == ["kernel", "bias"]
    assert [v.name for v in first.weights] == ["kernel", "bias"]
    # A plain layer in every way: it trains, is quantized and adapted again.
    compile_model(model)
    fit(model, features())
    first.quantize("int8")
    klp.enable_lora_plus(model, rank=2)


@pytest.mark.parametrize("mode", ["int8", "int4-blocks"])
def test_merging_quantizes_again_and_says_what_it_costs(mode, capsys):
    build, inputs = (functional, features()) if mode == "int8" else (text, tokens())
    model = quantized(build, mode)
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    expected = to_numpy(model(inputs))
    layers = [layer for layer in model._flatten_layers() if klp.layers.is_adapted(layer)]
    wanted = [as_float64(v) for layer in layers for v in layer.merged_values().values()]
    predicted = klp.requantization_errors(model)
    assert len(predicted) == (2 if mode == "int8" else 6)
    klp.merge_lora_plus(model)
    assert f"Merged into {len(predicted)} quantized matrices" in capsys.readouterr().out
    assert not all_factors(model)
    assert {layer.quantization_mode for layer in layers} == {mode.partition("-")[0]}
    for layer, value, error in zip(layers, wanted, predicted, strict=True):
        name = "_embeddings" if isinstance(layer, keras.layers.Embedding) else "_kernel"
        kept = as_float64(klp.layers.quantized.dequantized(layer, name))
        lost = np.linalg.norm(kept - value) / np.linalg.norm(value)
        assert error.of_matrix == pytest.approx(lost, rel=1e-4)
        assert error.path.startswith(layer.path)
        assert 0 < lost < (0.01 if mode == "int8" else 0.2)
    actual = to_numpy(model(inputs))
    assert_close(actual, expected, 3 * INT8 if mode == "int8" else 0.6)


def test_einsum_saved_and_loaded(tmp_path):
    """K12: int8 EinsumDense, adapted, as `.keras` and as weights."""
    inputs = keras.Input((3, 5))
    einsum = keras.layers.EinsumDense("bqm,muh->bquh", (None, 2, 4), bias_axes="uh", name="query")
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(einsum(inputs)))
    einsum.quantize("int8")
    klp.enable_lora_plus(model, rank=2, alpha=3)
    randomize_factors(model)
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype("float32")
    expected = to_numpy(model(x))
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("query").kernel.dtype == "int8"
    np.testing.assert_array_equal(to_numpy(loaded(x)), expected)
    randomize_factors(loaded, seed=5)
    assert relative_error(to_numpy(loaded(x)), expected) > 5e-2
    loaded.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(to_numpy(loaded(x)), expected)
    trained = {v.name for v in loaded.get_layer("query").trainable_variables}
    assert trained == {"lora_kernel_a", "lora_kernel_b"}
    klp.merge_lora_plus(loaded, dequantize=True)
    assert_close(to_numpy(loaded(x)), expected, INT8)


@pytest.mark.parametrize("mode", ["int4-blocks"])
def test_an_adapter_moves_between_quantized_and_float_bases(mode, tmp_path, capsys):
    model = quantized(text, mode)
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    klp.save_adapter(model, tmp_path / "a.safetensors")
    capsys.readouterr()
    # The same base: compared, neither noted nor warned of.
    again = quantized(text, mode)
    klp.load_adapter(again, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(to_numpy(again(tokens())), to_numpy(model(tokens())))
    plain = text()
    klp.load_adapter(plain, tmp_path / "a.safetensors")
    assert "int8" in capsys.readouterr().out
    for variable, other in zip(all_factors(plain), all_factors(model), strict=True):
        np.testing.assert_array_equal(to_numpy(variable), to_numpy(other))
    assert_close(
        to_numpy(plain(tokens())), to_numpy(model(tokens())), 0.05 if mode == "int8" else 0.6
    )


def test_weights_of_an_adapted_quantized_model_fit_the_base_alone(tmp_path):
    model = quantized(functional, "int4-blocks")
    model.save_weights(tmp_path / "base.weights.h5")
    expected = to_numpy(model(features()))
    other = quantized(functional, "int4-blocks")
    klp.enable_lora_plus(other, rank=2)
    other.get_layer("first").kernel_scale.assign(other.get_layer("first").kernel_scale * 2)
    other.load_weights(tmp_path / "base.weights.h5")
    np.testing.assert_array_equal(to_numpy(other(features())), expected)


def test_traces_follow_a_merge_into_quantized_layers():
    """Rule 9: values change, not variables."""
    model = quantized(functional, "int8")
    klp.enable_lora_plus(model, rank=2)
    outer = keras.Sequential([keras.Input((6,)), model])
    randomize_factors(model)
    expected = outer.predict(features(), verbose=0)
    klp.merge_lora_plus(model)
    merged = outer.predict(features(), verbose=0)
    assert_close(merged, expected, 3 * INT8)
    assert_close(merged, to_numpy(outer(features())), FLOAT32_MODEL)


class Doubled(keras.layers.Dense):
    def call(self, inputs, training=None):
        return keras.ops.multiply(super().call(inputs, training=training), 2.0)


def test_subclasses_stay_as_keras_has_them():
    """Keras runs no user's `call` for a quantized layer, so that 'super().call' says nothing."""
    layer = Doubled(4)
    layer.build((None, 3))
    layer.quantize("int8", type_check=False)
    assert "overrides `call`" in klp.layers.why_not_adoptable(layer)
    other = Doubled(4)
    other.build((None, 3))
    klp.layers.LoRAPlusDense.from_layer(other, rank=2)
    with pytest.raises(NotImplementedError, match="Keras quantizes no subclasses, and Doubled is"):
        other.quantize("int8")


def language_model(quantize):
    """A tied table at both ends, and one layer between them to adapt."""
    table = keras.layers.ReversibleEmbedding(11, 6, name="table", logit_soft_cap=3.0)
    inputs = keras.Input((4,), dtype="int32")
    hidden = keras.layers.Dense(6, activation="tanh", name="hidden")(table(inputs))
    model = filled(keras.Model(inputs, table(hidden, reverse=True)))
    if quantize == "first":
        table.quantize("int8")
    klp.enable_lora_plus(model, rank=2, targets=["hidden"])
    if quantize == "last":
        table.quantize("int8")
    randomize_factors(model)
    return model


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")
@pytest.mark.parametrize("quantize", ["last"])
def test_layers_before_quantized_logits_get_the_right_gradient(quantize):
    """Keras 3.15.1 alone gives a gradient that is wrong by most of its size."""
    ids = np.random.default_rng(0).integers(0, 11, size=(3, 4)).astype("int32")
    weights = np.random.default_rng(1).normal(size=(3, 4, 11)).astype("float32")
    model, plain = language_model(quantize), language_model(None)
    found, right = (_gradients(m, ids, weights) for m in (model, plain))
    for gradient, expected in zip(found, right, strict=True):
        assert_close(gradient, expected, 2 * INT8)
    model.get_layer("table").__dict__.pop("quantized_call")
    by_keras = _gradients(model, ids, weights)
    assert all(relative_error(g, e) > 0.2 for g, e in zip(by_keras, right, strict=True))
    klp.merge_lora_plus(plain)
    assert "quantized_call" not in vars(plain.get_layer("table"))


def _gradients(model, ids, weights):
    def loss():
        return keras.ops.sum(keras.ops.multiply(model(ids), weights))

    return gradients(loss, all_factors(model))
