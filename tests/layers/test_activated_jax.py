"""JAX: of a layer's activation only its inputs are kept for the gradient, where that is less."""

import functools

import keras
import numpy as np
import pytest
from tolerances import FLOAT32_LAYER, assert_close

import keras_loraplus as kl
from keras_loraplus import _compat

if keras.backend.backend() != "jax":
    pytest.skip("the other backends keep what their own operations say", allow_module_level=True)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

KEPT = ["gelu", "silu", "mish"]
LEFT = ["relu", "tanh", "sigmoid", "softmax", "leaky_relu", "linear"]


def is_recomputed(activation, x):
    # A function of its own each time: jax remembers what it traced.
    return "remat" in str(jax.make_jaxpr(lambda x: _compat.activated(activation, x))(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KEPT + LEFT)
def test_no_bit_of_the_values_changes_and_the_gradients_agree(name, dtype):
    activation = keras.activations.get(name)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), dtype)
    actual = jax.jit(lambda x: _compat.activated(activation, x))(x)
    np.testing.assert_array_equal(actual, jax.jit(activation)(x))
    if dtype == "float32":
        for order in (jax.grad, lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x) ** 2))):
            found = [
                order(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x)
                for f in (functools.partial(_compat.activated, activation), activation)
            ]
            assert_close(*found, FLOAT32_LAYER)


def test_what_is_recomputed(monkeypatch):
    x = jnp.ones((5, 7))
    for name in KEPT + LEFT:
        assert is_recomputed(keras.activations.get(name), x) == (name in KEPT), name
    # A user's function may have a state, which a recomputation must not touch again.
    assert not is_recomputed(lambda x: keras.activations.gelu(x), x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not is_recomputed(keras.activations.gelu, x)


def test_an_eager_call_is_not_traced(monkeypatch):
    recomputed = []
    monkeypatch.setattr(jax, "checkpoint", lambda function: recomputed.append(1) or function)
    _compat.activated(keras.activations.gelu, jnp.ones((5, 7)))
    assert not recomputed
    jax.jit(lambda x: _compat.activated(keras.activations.gelu, x))(jnp.ones((5, 7)))
    assert recomputed


def test_a_step_needs_less_memory(monkeypatch):
    """With the activation as it is, it needs more: the control."""
    keras.utils.set_random_seed(0)
    layers = [kl.layers.LoRAPlusDense(256, "gelu", rank=2) for _ in range(4)]
    model = keras.Sequential([keras.Input((256,)), *layers])
    x = jnp.ones((512, 256))
    values = [v.value for v in model.trainable_variables]
    frozen = [v.value for v in model.non_trainable_variables]

    def loss(values):
        return jnp.sum(model.stateless_call(values, frozen, x)[0] ** 2)

    def buffers():
        compiled = jax.jit(lambda values: jax.grad(loss)(values)).lower(values).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = buffers()
    monkeypatch.setattr(_compat, "activated", lambda activation, outputs: activation(outputs))
    assert buffers() - ours > 0.9 * x.nbytes * (len(layers) - 1)


class Noise(keras.layers.Layer):
    """An activation with a state of its own: the next draw's seed."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(1)

    def call(self, x):
        return keras.ops.gelu(x) + keras.random.normal(keras.ops.shape(x), seed=self.seed_generator)


@pytest.mark.parametrize("as_layer", [True, False])
def test_an_activation_with_a_state_trains(as_layer):
    """It draws as often as in the layer without an adapter."""
    draws = []
    for make in (functools.partial(kl.layers.LoRAPlusDense, rank=2), keras.layers.Dense):
        noise = Noise()
        layer = make(8, activation=noise if as_layer else lambda x, noise=noise: noise(x))
        layer.noise = noise
        model = keras.Sequential([keras.Input((8,)), layer])
        model.compile("sgd", "mse")
        before = np.array(noise.seed_generator.state.value)
        model.fit(np.ones((4, 8)), np.ones((4, 8)), epochs=2, verbose=0)
        draws.append((np.array(noise.seed_generator.state.value) - before).tolist())
    assert draws[0] == draws[1] != [0, 0]
