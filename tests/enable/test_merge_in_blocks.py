"""Merging forms every merged value once, in blocks of rows, and knows beforehand that it may."""

import keras
import numpy as np
import pytest
from lora_cases import ONE_OF_EACH, as_float64, ids, randomize_factors
from tiny_models import features, functional
from tolerances import FLOAT32_LAYER, FLOAT32_MODEL, assert_close

import keras_loraplus as klp
from keras_loraplus.layers import merging
from keras_loraplus.layers.base import LowRankLayer


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids(ONE_OF_EACH))
@pytest.mark.parametrize("block", [1, 17])
def test_blocks_hold_the_same_values_as_the_whole(case, block, monkeypatch):
    layer = case.make(rank=3, alpha=5.0)
    case.call(layer)
    randomize_factors(layer)
    whole = {name: as_float64(v) for name, v in layer.merged_values().items()}
    monkeypatch.setattr(merging, "BLOCK", block)
    blocks = {name: as_float64(v) for name, v in layer.merged_values().items()}
    assert blocks.keys() == whole.keys()
    for name, value in whole.items():
        assert len(merging._row_blocks(getattr(layer, name))) > 1 or block > 1
        assert np.abs(value - as_float64(getattr(layer, name))).max() > 0.01
        assert_close(blocks[name], value, FLOAT32_LAYER)
    assert layer.merges_finitely()


def test_every_value_is_formed_once(monkeypatch):
    formed = []
    form = LowRankLayer.merged_values
    monkeypatch.setattr(
        LowRankLayer, "merged_values", lambda layer: formed.append(layer.name) or form(layer)
    )
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    adapted = [layer.name for layer in model._flatten_layers() if isinstance(layer, LowRankLayer)]
    expected = keras.ops.convert_to_numpy(model(features()))
    klp.merge_lora_plus(model)
    assert formed == adapted and len(adapted) > 1
    assert_close(keras.ops.convert_to_numpy(model(features())), expected, FLOAT32_MODEL)


@pytest.mark.parametrize(
    ("dtype", "kernel", "factor", "sure", "merges"),
    [
        ("float32", 1.0, 1.0, True, True),
        ("bfloat16", 1.0, 1.0, True, True),
        ("float16", 1.0, 1.0, True, True),
        # Twelve entries of 20,000 have a norm above 65,504, and yet each of them fits.
        ("float16", 20000.0, 1.0, False, True),
        ("float16", 60000.0, 100.0, False, False),
        ("float32", np.nan, 1.0, False, False),
        ("float32", np.inf, 0.0, False, False),
        ("float32", 1.0, np.nan, False, False),
        ("float32", 1.0, 1e20, False, False),
    ],
)
def test_what_the_bound_says_is_what_merging_finds(dtype, kernel, factor, sure, merges):
    layer = klp.layers.LoRAPlusDense(3, rank=2, dtype=dtype)
    layer.build((None, 4))
    layer._kernel.assign(np.full((4, 3), kernel))
    layer.lora_kernel_a.assign(np.full((4, 2), factor))
    layer.lora_kernel_b.assign(np.full((2, 3), factor))
    assert layer.merges_finitely() == sure
    (value,) = layer.merged_values().values()
    assert bool(np.isfinite(as_float64(value)).all()) == merges
