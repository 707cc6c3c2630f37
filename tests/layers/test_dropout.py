"""K20: adapter dropout acts in training and not in inference, on every layer type."""

import keras
import numpy as np
import pytest
from lora_cases import CASES, ONE_OF_EACH, ids, randomize_factors
from tolerances import FLOAT32_LAYER, assert_close, relative_error

import keras_loraplus as klp


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def adopted(case, dropout=0.5):
    layer = case.make_plain()
    case.lora.from_layer(layer, rank=3, alpha=5.0, dropout=dropout)
    randomize_factors(layer)
    return layer


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids(ONE_OF_EACH))
def test_training_drops_and_inference_does_not(case):
    layer = adopted(case)
    inference = to_numpy(case.call(layer))
    assert_close(inference, case.expected(layer), FLOAT32_LAYER)
    np.testing.assert_array_equal(to_numpy(case.call(layer, training=False)), inference)
    first = to_numpy(case.call(layer, training=True))
    second = to_numpy(case.call(layer, training=True))
    assert relative_error(first, inference) > 1e-2
    assert relative_error(first, second) > 1e-2


@pytest.mark.parametrize("case", CASES[:1] + CASES[7:9] + CASES[13:14], ids=lambda c: c.name)
def test_dropout_touches_the_adapter_alone(case):
    layer = adopted(case)
    for variable in layer.adapter_variables().values():
        variable.assign(np.zeros(variable.shape))
    np.testing.assert_array_equal(
        to_numpy(case.call(layer, training=True)), to_numpy(case.call(layer, training=False))
    )


def test_dropped_inputs_keep_their_mean():
    layer = klp.layers.LoRAPlusDense(4, rank=2, dropout=0.25)
    x = np.ones((4000, 3), "float32")
    layer(x)
    randomize_factors(layer)
    mean = to_numpy(layer(x, training=True)).mean(0)
    # 4000 draws: the mean of a dropped sum is off by about a hundredth of its size.
    assert_close(mean, to_numpy(layer(x)).mean(0), 0.1)


def test_an_embedding_drops_whole_tokens():
    layer = klp.layers.LoRAPlusEmbedding(5, 4, rank=3, dropout=0.5)
    tokens = np.ones((1, 400), "int32")
    layer(tokens)
    randomize_factors(layer)
    frozen = to_numpy(layer.embeddings)[1]
    delta = to_numpy(layer(tokens))[0, 0] - frozen
    seen = to_numpy(layer(tokens, training=True))[0] - frozen
    ratios = seen @ delta / (delta @ delta)
    assert_close(seen, np.outer(ratios, delta), 1e-4)
    np.testing.assert_allclose(np.unique(ratios.round(3)), [0.0, 2.0], atol=2e-3)
    assert 0.3 < np.mean(ratios < 1) < 0.7


@keras.saving.register_keras_serializable("tests")
class PlainCallDense(keras.layers.Dense):
    """A user's layer whose `call` takes no `training`."""

    def call(self, inputs):
        return keras.ops.multiply(super().call(inputs), 2.0)


@keras.saving.register_keras_serializable("tests")
class PlainCallConv(keras.layers.Conv1D):
    def call(self, inputs):
        return keras.ops.multiply(super().call(inputs), 2.0)


def dense_model(layer):
    inputs = keras.Input((4, 6))
    return keras.Model(inputs, layer(inputs))


MAKERS = {
    "dense": lambda: keras.layers.Dense(5),
    "einsum": lambda: keras.layers.EinsumDense("abc,cd->abd", (None, 5)),
    "conv": lambda: keras.layers.Conv1D(5, 2),
    "user-dense": lambda: PlainCallDense(5),
    "user-conv": lambda: PlainCallConv(5, 2),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_dropout_acts_in_a_functional_model(kind, backend):
    """Layers whose Keras `call` names no `training` get it after adoption, traced too."""
    layer = MAKERS[kind]()
    model = dense_model(layer)
    klp.enable_lora_plus(model, rank=2, targets=[layer.name], dropout=0.5)
    randomize_factors(model)
    x = np.random.default_rng(0).normal(size=(3, 4, 6)).astype("float32")
    inference = to_numpy(model(x))
    np.testing.assert_array_equal(to_numpy(model(x, training=False)), inference)
    assert relative_error(to_numpy(model(x, training=True)), inference) > 1e-2
    assert_close(model.predict(x, verbose=0), inference, 1e-6)
    assert_close(model.predict(x, verbose=0), inference, 1e-6)
    if backend == "jax":
        values = [
            [v.value for v in vs]
            for vs in (model.trainable_variables, model.non_trainable_variables)
        ]
        outputs, states = model.stateless_call(*values, x, training=True)
        assert relative_error(outputs, inference) > 1e-2
        again, _ = model.stateless_call(values[0], states, x, training=True)
        assert relative_error(again, outputs) > 1e-2


@pytest.mark.parametrize("kind", MAKERS)
def test_dropout_acts_in_fit(kind):
    """With a learning rate of zero, only dropout makes the training loss differ by epoch."""

    def losses(dropout):
        keras.utils.set_random_seed(3)
        layer = MAKERS[kind]()
        model = dense_model(layer)
        klp.enable_lora_plus(model, rank=2, targets=[layer.name], dropout=dropout)
        randomize_factors(model)
        model.compile(keras.optimizers.SGD(0.0), loss="mse")
        x = np.random.default_rng(0).normal(size=(3, 4, 6)).astype("float32")
        history = model.fit(x, to_numpy(model(x)), epochs=2, batch_size=3, verbose=0)
        return history.history["loss"]

    first, second = losses(0.0)
    assert first < 1e-10 and second < 1e-10
    first, second = losses(0.5)
    assert first > 1e-4 and second > 1e-4 and abs(first - second) > 1e-6
