"""Rule 1: enabling changes no output."""

import keras
import numpy as np
import pytest
from lora_cases import ONE_OF_EACH, ids, randomize_factors
from tiny_models import MODELS
from tolerances import COMPILED_FLOAT32, assert_close, relative_error

import keras_loraplus as klp


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


@pytest.mark.parametrize("init", ["loraplus", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_eager_outputs_are_equal_bit_for_bit(name, init):
    make, inputs = MODELS[name]
    model = make()
    before = to_numpy(model(inputs()))
    klp.enable_lora_plus(model, rank=2, alpha=5, init=init)
    np.testing.assert_array_equal(to_numpy(model(inputs())), before)
    randomize_factors(model)
    assert relative_error(to_numpy(model(inputs())), before) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_compiled_outputs_are_equal(name):
    make, inputs = MODELS[name]
    model = make()
    before = model.predict(inputs(), verbose=0)
    klp.enable_lora_plus(model, rank=2)
    after = model.predict(inputs(), verbose=0)
    assert_close(after, before, COMPILED_FLOAT32)
    # The trace from before enabling is gone: the adapter is seen.
    randomize_factors(model)
    assert relative_error(model.predict(inputs(), verbose=0), before) > 1e-2


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids(ONE_OF_EACH))
def test_every_layer_in_low_precision(case, policy):
    layer = case.make_plain(dtype=policy)
    before = to_numpy(case.call(layer))
    case.lora.from_layer(layer, rank=3)
    after = case.call(layer)
    assert after.dtype == case.call(layer).dtype
    np.testing.assert_array_equal(to_numpy(after), before)
