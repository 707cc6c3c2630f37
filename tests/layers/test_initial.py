"""Initial values of A and B: the reference's laws, alike on every backend, nothing compiled."""

import keras
import numpy as np
import pytest

import keras_loraplus as klp

RANK, FAN_IN, UNITS = 5, 211, 307


def seeds(count, seed):
    """The seeds that Keras gives the next initializers after `set_random_seed`."""
    keras.utils.set_random_seed(seed)
    found = [keras.initializers.RandomUniform().seed for _ in range(count)]
    keras.utils.set_random_seed(seed)
    return found


def dense(init, **options):
    layer = klp.layers.LoRAPlusDense(UNITS, use_bias=False, init=init, rank=RANK, **options)
    layer.build((None, FAN_IN))
    return tuple(
        keras.ops.convert_to_numpy(value) for value in (layer.lora_kernel_a, layer.lora_kernel_b)
    )


@pytest.mark.parametrize(("init", "random", "fan"), [("loraplus", 1, RANK), ("lora", 0, FAN_IN)])
def test_one_side_is_drawn_within_its_bound_and_the_other_is_zero(init, random, fan):
    first, second = dense(init)[random], dense(init)[random]
    bound = 1 / np.sqrt(fan)
    assert np.abs(first).max() <= bound * (1 + 1e-6)
    # Of a uniform law, and to three standard errors of some thousand draws.
    spread = bound / np.sqrt(3)
    assert abs(first.mean()) < 3 * spread / np.sqrt(first.size)
    assert first.std() == pytest.approx(spread, rel=0.05)
    assert not np.any(dense(init)[1 - random])
    # Each layer draws its own.
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1


def test_a_seed_starts_every_backend_alike():
    # The kernel's initializer draws its seed before those of A and B.
    found = seeds(4, 7)
    _, b = dense("loraplus", kernel_initializer="zeros")
    draws = [
        np.random.default_rng(seed).uniform(-1 / np.sqrt(RANK), 1 / np.sqrt(RANK), b.shape)
        for seed in found
    ]
    assert sum(np.array_equal(b, draw.astype("float32")) for draw in draws) == 1


def test_an_embedding_draws_a_normal_b():
    layer = klp.layers.LoRAPlusEmbedding(11, 1201, init="lora", rank=RANK)
    layer.build()
    b = keras.ops.convert_to_numpy(layer.lora_embeddings_b)
    assert abs(b.mean()) < 3 / np.sqrt(b.size)
    assert b.std() == pytest.approx(1, rel=0.05)


def test_room_for_other_ranks_is_zero():
    _, b = dense("loraplus", max_rank=RANK + 2)
    assert np.any(b[:RANK])
    assert not np.any(b[RANK:])


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only JAX compiles eager values")
def test_enabling_compiles_nothing_for_a_shape():
    import jax

    def model(width):
        inputs = keras.Input((width,))
        hidden = keras.layers.Dense(width + 2)(inputs)
        return keras.Model(inputs, keras.layers.Dense(width + 6)(hidden))

    compiled = []

    def count(name, _, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    first, second = model(101), model(131)
    klp.enable_lora_plus(first, rank=3)  # what every enabling compiles: scalars
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        klp.enable_lora_plus(second, rank=7)
        assert not compiled
        second(np.ones((1, 131), "float32"))
        assert compiled  # the listener hears
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
