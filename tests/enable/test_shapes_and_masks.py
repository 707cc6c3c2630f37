"""Unknown sizes, masks, shared layers, and scopes: an adapted layer is used as the plain one."""

import keras
import numpy as np
import pytest
from lora_cases import all_factors, randomize_factors
from tiny_models import VOCABULARY, compile_model, filled, tokens
from tolerances import COMPILED_FLOAT32, FLOAT32_MODEL, assert_close, relative_error

import keras_loraplus as klp


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


CONVOLUTIONS = {
    "conv1d": (keras.layers.Conv1D, {"padding": "same"}, (None, 4), (7, 4)),
    "conv1d-causal": (keras.layers.Conv1D, {"padding": "causal"}, (None, 4), (7, 4)),
    "conv1d-groups": (keras.layers.Conv1D, {"groups": 2}, (None, 4), (7, 4)),
    "conv2d": (keras.layers.Conv2D, {"strides": 2}, (None, None, 4), (7, 6, 4)),
    "conv2d-groups": (keras.layers.Conv2D, {"groups": 2}, (None, None, 4), (7, 6, 4)),
    "conv2d-groups-one-known": (keras.layers.Conv2D, {"groups": 4}, (None, 6, 4), (7, 6, 4)),
    "conv3d-groups": (keras.layers.Conv3D, {"groups": 2}, (None, None, 3, 4), (4, 5, 3, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_unknown_size(name):
    layer_class, options, symbolic, shape = CONVOLUTIONS[name]
    inputs = keras.Input(symbolic)
    hidden = layer_class(8, 3, name="conv", **options)(inputs)
    outputs = keras.layers.Conv1D(3, 1, name="head")(hidden) if len(shape) == 2 else hidden * 1.0
    model = filled(keras.Model(inputs, outputs))
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype("float32")
    before = model.predict(x, verbose=0)
    klp.enable_lora_plus(model, rank=2, targets=["conv"])
    assert_close(model.predict(x, verbose=0), before, COMPILED_FLOAT32)
    randomize_factors(model)
    adapted = model.predict(x, verbose=0)
    assert relative_error(adapted, before) > 1e-2
    # A symbolic call on the adapted layers, and another size.
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    assert_close(twin.predict(x, verbose=0), adapted, COMPILED_FLOAT32)
    compile_model(model, klp.LoRAPlusAdamW(1e-2))
    model.compile(klp.LoRAPlusAdamW(1e-2), loss="mse")
    model.fit(x, before, verbose=0)
    trained = model.predict(x[:, :-1] if "one-known" not in name else x, verbose=0)
    klp.merge_lora_plus(model)
    merged = model.predict(x[:, :-1] if "one-known" not in name else x, verbose=0)
    assert_close(merged, trained, FLOAT32_MODEL)


# Recurrent layers of nightly builds (3.16.0.dev2026102704) use a mask and warn that they lose it.
@pytest.mark.filterwarnings("ignore:Layer 'reader' .of type LSTM. was passed an input with a mask")
@pytest.mark.parametrize("kind", ["embedding", "reversible", "embedding-dense"])
def test_masks_pass_through(kind):
    inputs = keras.Input((None,), dtype="int32")
    if kind == "reversible":
        table = keras.layers.ReversibleEmbedding(VOCABULARY, 6, mask_zero=True, name="table")
    else:
        table = keras.layers.Embedding(VOCABULARY, 6, mask_zero=True, name="table")
    x = table(inputs)
    if kind == "embedding-dense":
        x = keras.layers.Dense(6, name="dense")(x)
    x = keras.layers.LSTM(4, name="reader")(x)
    model = filled(keras.Model(inputs, keras.layers.Dense(3, name="head")(x)))
    short, long = tokens(4)[:, :4], tokens(4)
    np.testing.assert_array_equal(long[:, 4], 0)
    before = to_numpy(model(long))
    klp.enable_lora_plus(model, rank=2)
    np.testing.assert_array_equal(to_numpy(model(long)), before)
    randomize_factors(model)
    adapted = to_numpy(model(long))
    assert relative_error(adapted, before) > 1e-3
    # A masked step at the end changes nothing; without the mask it would.
    assert_close(adapted, to_numpy(model(short)), FLOAT32_MODEL)
    np.testing.assert_array_equal(
        to_numpy(table.compute_mask(long)) if kind != "reversible" else long != 0, long != 0
    )
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    assert_close(to_numpy(twin(long)), adapted, FLOAT32_MODEL)
    klp.merge_lora_plus(model)
    assert_close(to_numpy(model(long)), adapted, FLOAT32_MODEL)


def test_tied_weights_in_a_functional_model():
    inputs = keras.Input((None,), dtype="int32")
    table = keras.layers.ReversibleEmbedding(VOCABULARY, 6, name="table")
    x = keras.layers.Dense(6, name="dense")(table(inputs))
    model = filled(keras.Model(inputs, table(x, reverse=True)))
    before = to_numpy(model(tokens()))
    report = klp.enable_lora_plus(model, rank=2, targets=["table", "dense"])
    assert [layer.path for layer in report.adapted] == ["table", "dense"]
    np.testing.assert_array_equal(to_numpy(model(tokens())), before)
    randomize_factors(model)
    adapted = model.predict(tokens(), verbose=0)
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    assert_close(twin.predict(tokens(), verbose=0), adapted, COMPILED_FLOAT32)
    klp.merge_lora_plus(model)
    assert_close(model.predict(tokens(), verbose=0), adapted, FLOAT32_MODEL)
    assert len(model.weights) == 3


def test_a_layer_used_twice_is_adapted_once():
    inputs = keras.Input((6,))
    shared = keras.layers.Dense(6, activation="tanh", name="shared")
    model = filled(keras.Model(inputs, keras.layers.Dense(3, name="head")(shared(shared(inputs)))))
    report = klp.enable_lora_plus(model, rank=2)
    assert [layer.path for layer in report.adapted] == ["shared"]
    assert len(all_factors(model)) == 2
    randomize_factors(model)
    kernel, a, b, bias = (
        to_numpy(v).astype("float64")
        for v in (shared.kernel, shared.lora_kernel_a, shared.lora_kernel_b, shared.bias)
    )
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    hidden = np.tanh(x @ (kernel + a @ b) + bias)
    hidden = np.tanh(hidden @ (kernel + a @ b) + bias)
    head = model.get_layer("head")
    expected = hidden @ to_numpy(head.kernel) + to_numpy(head.bias)
    assert_close(to_numpy(model(x)), expected, FLOAT32_MODEL)


def test_paths_of_factors_do_not_depend_on_open_scopes():
    def paths(model):
        return [v.path for v in model.variables]

    def model():
        return filled(
            keras.Sequential(
                [
                    keras.Input((6,)),
                    keras.layers.Dense(4, name="a"),
                    keras.layers.Dense(3, name="b"),
                ],
                name="net",
            )
        )

    plain, scoped = model(), model()
    klp.enable_lora_plus(plain, rank=2)
    with keras.name_scope("outer"):
        klp.enable_lora_plus(scoped, rank=2)
    assert paths(scoped) == paths(plain)
    layer = keras.layers.Dense(4, name="alone")
    layer.build((None, 6))
    with keras.name_scope("outer"):
        klp.layers.LoRAPlusDense.from_layer(layer, rank=2)
    assert {v.path for v in layer.weights} == {
        "alone/kernel",
        "alone/bias",
        "alone/lora_kernel_a",
        "alone/lora_kernel_b",
        "alone/lora_scaling",
    }


def test_float16_kernels():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, dtype="float16", name="hidden")(inputs)
    model = filled(keras.Model(inputs, keras.layers.Dense(3, name="head")(x)))
    before = to_numpy(model.get_layer("hidden").kernel).astype("float64")
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    hidden = model.get_layer("hidden")
    a, b = (to_numpy(v).astype("float64") for v in (hidden.lora_kernel_a, hidden.lora_kernel_b))
    klp.merge_lora_plus(model)
    assert keras.backend.standardize_dtype(hidden.kernel.dtype) == "float16"
    np.testing.assert_array_equal(to_numpy(hidden.kernel), (before + a @ b).astype("float16"))
