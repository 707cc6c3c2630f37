"""An adapter of a 7B-shaped plan: 32 layers, 4096 wide, query and value, rank 8."""

import os
import time

import keras
import pytest
from lora_cases import all_factors, randomize, snapshot
from tolerances import EXACT, assert_close

import keras_loraplus as klp

LAYERS, WIDTH, RANK = 32, 4096, 8
EXPERTS = WIDTH // RANK


@keras.saving.register_keras_serializable("tests")
class Attention(keras.layers.Layer):
    """Query and value projections whose A and B have as many entries as those of 4096 x 4096.

    512 experts of 8 x 8 have factors of 512 x 8 x 8, and a kernel of 32,768 entries, not 16.8
    million: what an adapter file holds is all there and the frozen model fits anywhere.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        shape = (EXPERTS, RANK)
        self._query_dense = keras.layers.EinsumDense("bei,eih->beh", shape, name="query")
        self._value_dense = keras.layers.EinsumDense("bei,eih->beh", shape, name="value")

    def call(self, inputs):
        return self._value_dense(self._query_dense(inputs))


@keras.saving.register_keras_serializable("tests")
class Decoder(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._self_attention_layer = Attention(name="self_attention")

    def call(self, inputs):
        return self._self_attention_layer(inputs)


def shaped_like_7b():
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((EXPERTS, RANK))
    for number in range(LAYERS):
        x = Decoder(name=f"transformer_layer_{number}")(x)
    return keras.Model(inputs, x)


def seconds(action):
    """Returns the processor time, in all threads, that an action takes."""
    start = time.process_time()
    action()
    return time.process_time() - start


@pytest.mark.timeout(300)
def test_it_saves_and_loads_in_a_second_and_64_kib(tmp_path):
    model = shaped_like_7b()
    klp.enable_lora_plus(model, rank=RANK, targets=[".*query", ".*value"], trainable=())
    factors = all_factors(model)
    parameters = sum(v.shape[0] * v.shape[1] * v.shape[2] for v in factors)
    assert len(factors) == 4 * LAYERS and parameters == LAYERS * 2 * 2 * WIDTH * RANK == 4_194_304
    randomize(factors)
    values = snapshot(factors)
    path = tmp_path / "a.safetensors"
    # The best of three, in processor time: the bar is for the work, whatever else runs meanwhile.
    saving = [seconds(lambda: klp.save_adapter(model, path)) for _ in range(3)]
    assert os.path.getsize(path) - 4 * parameters <= 64 * 1024
    randomize(factors, seed=1)
    loading = [seconds(lambda: klp.load_adapter(model, path)) for _ in range(3)]
    for variable, value in zip(factors, values, strict=True):
        assert_close(keras.ops.convert_to_numpy(variable), value, EXACT)
    print(f"saving {saving}, loading {loading}, beside A and B: ", end="")
    print(f"{os.path.getsize(path) - 4 * parameters:,} bytes")
    assert min(saving) < 1.0 and min(loading) < 1.0, (saving, loading)
    twin = shaped_like_7b()
    print(f"into a model without adapters: {seconds(lambda: klp.load_adapter(twin, path)):.2f} s")
    for variable, value in zip(all_factors(twin), values, strict=True):
        assert_close(keras.ops.convert_to_numpy(variable), value, EXACT)
