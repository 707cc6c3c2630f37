"""`adapters_disabled`: the base model for a while, in functions traced before, and back exactly."""

import keras
import numpy as np
import pytest
from keras import ops
from tolerances import COMPILED_FLOAT32, EXACT, assert_close

import keras_loraplus as klp


class CountsTraces(keras.layers.Layer):
    """Counts how often its `call` runs in Python: once a trace, once a step where nothing is."""

    calls = 0

    def call(self, inputs):
        CountsTraces.calls += 1
        return inputs

    def compute_output_shape(self, input_shape):
        return input_shape


def model_and_data():
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(7, activation="tanh"),
            CountsTraces(),
            keras.layers.Dense(6, activation="tanh"),
            keras.layers.Dense(3),
        ]
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 5)).astype("float32")
    y = rng.normal(size=(8, 3)).astype("float32")
    base = model.predict(x, verbose=0)
    klp.enable_lora_plus(model, rank=2, alpha=6)
    for layer in (model.layers[0], model.layers[2]):
        for variable in layer.adapter_variables().values():
            variable.assign(rng.normal(size=variable.shape))
    model.compile(klp.LoRAPlusAdamW(1e-3), "mse")
    return model, x, y, base


def eager(model, x):
    return ops.convert_to_numpy(model(x))


def factors(model):
    return {
        (layer.name, name): ops.convert_to_numpy(variable)
        for layer in (model.layers[0], model.layers[2])
        for name, variable in layer.adapter_variables().items()
    }


def test_traced_predict_and_evaluate_give_the_base_model(backend):
    model, x, y, base = model_and_data()
    adapted, loss = model.predict(x, verbose=0), model.evaluate(x, y, verbose=0)
    assert np.abs(adapted - base).max() > 0.1
    before = CountsTraces.calls
    with klp.adapters_disabled(model) as same:
        assert same is model
        assert_close(model.predict(x, verbose=0), base, COMPILED_FLOAT32)
        base_loss = np.mean((base - y) ** 2)
        assert_close(model.evaluate(x, y, verbose=0), base_loss, COMPILED_FLOAT32)
    assert_close(model.predict(x, verbose=0), adapted, EXACT)
    assert_close(model.evaluate(x, y, verbose=0), loss, EXACT)
    if backend != "torch":  # torch runs eagerly: every step calls
        assert CountsTraces.calls == before


def test_a_traced_fit_inside_trains_the_head_on_the_base_model():
    model, x, y, _ = model_and_data()
    model.fit(x, y, epochs=2, verbose=0)
    before, head = factors(model), ops.convert_to_numpy(model.layers[3].kernel)
    with klp.adapters_disabled(model):
        base = model.predict(x, verbose=0)
        loss = model.fit(x, y, epochs=1, verbose=0).history["loss"][0]
        assert_close(loss, np.mean((base - y) ** 2), COMPILED_FLOAT32)
    for name, value in factors(model).items():
        assert_close(value, before[name], EXACT)
    assert np.abs(ops.convert_to_numpy(model.layers[3].kernel) - head).max() > 0


def test_it_comes_back_from_an_error_and_nests():
    model, x, _, base = model_and_data()
    adapted = eager(model, x)
    with pytest.raises(RuntimeError, match="inside"), klp.adapters_disabled(model):
        with klp.adapters_disabled(model):
            pass
        assert_close(eager(model, x), base, COMPILED_FLOAT32)
        raise RuntimeError("inside")
    assert_close(eager(model, x), adapted, EXACT)


def test_what_is_saved_inside_is_the_adapter(tmp_path):
    model, x, _, _ = model_and_data()
    adapted = eager(model, x)
    with klp.adapters_disabled(model):
        model.save_weights(tmp_path / "a.weights.h5")
        klp.save_adapter(model, tmp_path / "a.safetensors")
    for layer in (model.layers[0], model.layers[2]):
        for variable in layer.adapter_variables().values():
            variable.assign(ops.zeros(variable.shape))
    model.load_weights(tmp_path / "a.weights.h5")
    assert_close(eager(model, x), adapted, EXACT)
    klp.load_adapter(model, tmp_path / "a.safetensors")
    assert_close(eager(model, x), adapted, EXACT)


def test_a_model_without_adapters_is_an_error():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="no LoRA\\+ adapters to disable"):
        with klp.adapters_disabled(model):
            pass
