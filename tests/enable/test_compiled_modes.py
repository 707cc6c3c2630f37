"""`jit_compile`, no second trace, and rematerialisation: the same numbers as without."""

import keras
import numpy as np
import pytest
from lora_cases import all_factors, as_float64, randomize_factors, snapshot
from tiny_models import MODELS, compile_model, fit
from tolerances import FLOAT32_MODEL, assert_close

import keras_loraplus as klp


def trained(make, data, epochs=2, **compile_arguments):
    """Returns what three steps an epoch make of an adapted model with non-zero A and B."""
    model = make()
    klp.enable_lora_plus(model, rank=2, alpha=3)
    randomize_factors(model)
    start = snapshot(all_factors(model))
    compile_model(model, klp.LoRAPlusAdamW(0.01, lr_ratio=4.0), **compile_arguments)
    history = fit(model, data(), epochs=epochs).history["loss"]
    moved = [
        np.abs(as_float64(v) - s).max() for v, s in zip(all_factors(model), start, strict=True)
    ]
    assert min(moved) > 1e-3
    return model, [as_float64(v) for v in model.trainable_variables], history


def assert_same(one, other):
    for first, second in zip(one[1], other[1], strict=True):
        assert_close(first, second, FLOAT32_MODEL)
    assert_close(one[2], other[2], FLOAT32_MODEL)


# torch.compile warns of its own code, and of what Keras does to tensors that are no leaves.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["functional", "normalised", "text"])
def test_jit_compile_gives_the_same_numbers(name, backend):
    if backend == "torch" and name != "functional":
        pytest.skip("torch.compile takes 18 seconds for each of these models; one shows it")
    make, data = MODELS[name]
    compiled = trained(make, data, jit_compile=True)
    assert compiled[0].jit_compile is True
    assert_same(trained(make, data, jit_compile=False), compiled)


def graph_breaks(model, inputs):
    """Returns how often torch.compile leaves the graph in a forward pass."""
    import torch

    torch._dynamo.reset()
    return torch._dynamo.explain(lambda x: model(x, training=True))(inputs).graph_break_count


@pytest.mark.filterwarnings("ignore")
def test_adapters_break_no_graph_of_torch_compile(backend):
    if backend != "torch":
        pytest.skip("torch.compile is torch's")
    make, data = MODELS["functional"]
    inputs = keras.ops.convert_to_tensor(data())
    plain, adapted = make(), make()
    klp.enable_lora_plus(adapted, rank=2)
    assert graph_breaks(adapted, inputs) <= graph_breaks(plain, inputs)


class CountsTraces(keras.losses.Loss):
    """Counts how often Python computes it: once a trace."""

    traces = 0

    def call(self, y_true, y_pred):
        CountsTraces.traces += 1
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)


@pytest.mark.parametrize("name", list(MODELS))
def test_nothing_is_traced_after_the_first_epoch(name, backend):
    if backend == "torch":
        pytest.skip("torch runs eagerly: every step is Python")
    make, data = MODELS[name]
    model = make()
    klp.enable_lora_plus(model, rank=2, dropout=0.1)
    model.compile(klp.LoRAPlusAdamW(0.01), CountsTraces())
    fit(model, data())
    after_one = CountsTraces.traces
    fit(model, data(), epochs=3)
    assert CountsTraces.traces == after_one


def test_rematerialisation_gives_the_same_numbers():
    make, data = MODELS["functional"]

    def checkpointed():
        # Of whole layers Keras 3.15.1 fails on TensorFlow, without adapters too.
        with keras.RematScope(mode="activations"):
            return make()

    assert_same(trained(make, data), trained(checkpointed, data))
