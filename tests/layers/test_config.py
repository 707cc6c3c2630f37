"""Rule 10 and K04: configs of standalone layers round-trip whole, at non-default values."""

import copy
import json

import keras
import numpy as np
import pytest
from lora_cases import CASES, ONE_OF_EACH, factors, ids, randomize
from tolerances import FLOAT32_LAYER, assert_close

from keras_loraplus import layers as kl

SETTINGS = {"rank": 2, "alpha": 7.0, "init": "lora", "scaling": "rslora", "dropout": 0.25}


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def built(case):
    layer = case.make(**SETTINGS, name="mine")
    case.call(layer)
    randomize(layer.weights)
    return layer


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids(ONE_OF_EACH))
def test_config_round_trip(case):
    layer = built(case)
    config = json.loads(json.dumps(layer.get_config()))
    assert {name: config[name] for name in SETTINGS} == SETTINGS
    twin = type(layer).from_config(config)
    case.call(twin)
    assert twin.get_config() == layer.get_config()
    for mine, theirs in zip(twin.weights, layer.weights, strict=True):
        assert mine.name == theirs.name
        assert mine.trainable == theirs.trainable
        if "seed" not in mine.name:
            mine.assign(theirs)
    np.testing.assert_array_equal(to_numpy(case.call(twin)), to_numpy(case.call(layer)))
    assert_close(to_numpy(case.call(twin)), case.expected(layer), FLOAT32_LAYER)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_build_config_rebuilds_without_a_call(case):
    layer = built(case)
    twin = type(layer).from_config(layer.get_config())
    twin.build_from_config(layer.get_build_config())
    assert [(v.name, tuple(v.shape)) for v in twin.weights] == [
        (v.name, tuple(v.shape)) for v in layer.weights
    ]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_registered_serialization(case):
    layer = built(case)
    text = json.dumps(keras.saving.serialize_keras_object(layer))
    twin = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(twin) is type(layer)
    assert twin.get_config() == layer.get_config()


def test_a_pair_of_initializers_round_trips():
    init = ("zeros", keras.initializers.RandomNormal(stddev=0.3, seed=4))
    layer = kl.LoRAPlusDense(3, rank=2, init=init)
    twin = kl.LoRAPlusDense.from_config(json.loads(json.dumps(layer.get_config())))
    assert twin.get_config() == layer.get_config()
    x = np.ones((1, 4), "float32")
    layer(x), twin(x)
    np.testing.assert_array_equal(to_numpy(twin.lora_kernel_b), to_numpy(layer.lora_kernel_b))
    assert np.std(to_numpy(layer.lora_kernel_b)) > 0.05


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids(ONE_OF_EACH))
def test_deepcopy_is_an_independent_layer(case):
    layer = built(case)
    before = to_numpy(case.call(layer))
    twin = copy.deepcopy(layer)
    np.testing.assert_array_equal(to_numpy(case.call(twin)), before)
    randomize(factors(twin), seed=23)
    assert not np.array_equal(to_numpy(case.call(twin)), before)
    np.testing.assert_array_equal(to_numpy(case.call(layer)), before)


@pytest.mark.parametrize(
    "init, a_bound, b_bound",
    [("loraplus", 0.0, 1 / np.sqrt(16)), ("lora", 1 / np.sqrt(300), 0.0)],
)
def test_initial_values_are_those_of_the_reference(init, a_bound, b_bound):
    layer = kl.LoRAPlusDense(200, rank=16, init=init)
    layer.build((None, 300))
    for variable, bound in zip(factors(layer), (a_bound, b_bound), strict=True):
        value = to_numpy(variable)
        assert np.max(np.abs(value)) <= bound
        # Uniform: the standard deviation is the bound over the square root of three.
        np.testing.assert_allclose(value.std(), bound / np.sqrt(3), rtol=0.05)


def test_initial_values_of_convolutions_and_embeddings():
    conv = kl.LoRAPlusConv2D(8, (3, 5), rank=4, init="lora")
    conv.build((None, 9, 9, 20))
    np.testing.assert_allclose(
        np.max(np.abs(to_numpy(conv.lora_kernel_a))), 1 / np.sqrt(3 * 5 * 20), rtol=0.05
    )
    table = kl.LoRAPlusEmbedding(50, 400, rank=8, init="lora")
    table.build()
    assert np.max(np.abs(to_numpy(table.lora_embeddings_a))) == 0.0
    np.testing.assert_allclose(to_numpy(table.lora_embeddings_b).std(), 1.0, rtol=0.1)


def test_equal_layers_start_with_different_factors():
    values = []
    for _ in range(2):
        layer = kl.LoRAPlusDense(6, rank=3)
        layer.build((None, 5))
        values.append(to_numpy(layer.lora_kernel_b))
    assert not np.array_equal(*values)
