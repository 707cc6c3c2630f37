"""JAX: a product with a frozen matrix, whose gradient XLA forms as its mirror for few tokens."""

import math
import re

import keras
import numpy as np
import pytest
from tolerances import FLOAT32_LAYER, assert_close

from keras_loraplus import _compat
from keras_loraplus._compat import frozen

if keras.backend.backend() != "jax":
    pytest.skip("the other backends arrange this gradient otherwise", allow_module_level=True)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

SHAPES = [(5, 7), (2, 3, 7), (2, 1, 3, 7), (7,), (0, 7), (16, 4, 130), (65, 130)]


def operands(shape, dtype="float32"):
    """Returns inputs, a matrix, and a weight for each output."""
    rng = np.random.default_rng(0)
    n, m = shape[-1], 11 if shape[-1] == 7 else 257
    shapes = (shape, (n, m), (*shape[:-1], m))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def loss(product, x, w, weights):
    return jnp.sum(weights * jnp.sin(product(x, w)))


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_matmul(shape):
    x, w, weights = operands(shape)

    def found(product):
        def slope(x, weights):
            return jnp.sum(jax.grad(loss, argnums=1)(product, x, w, weights) ** 2)

        def both(x, weights):
            gradient = jax.grad(loss, argnums=1)(product, x, w, weights)
            return product(x, w), gradient, jax.grad(slope, argnums=1)(x, weights)

        return jax.jit(both)(x, weights)

    for one, other in zip(found(_compat.matmul_of_frozen), found(keras.ops.matmul), strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other, FLOAT32_LAYER)
        assert not one.size or abs(one).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_bit_of_the_values_changes(shape, dtype):
    x, w, _ = operands(shape, dtype)
    for run in (lambda f: f, jax.jit):
        actual = run(_compat.matmul_of_frozen)(x, w)
        expected = run(keras.ops.matmul)(x, w)
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


EQUATIONS = [
    ("abc,cde->abde", (2, 3, 130), (130, 3, 43)),
    ("abcd,cde->abe", (2, 3, 3, 43), (3, 43, 130)),
    ("abcd,cde->abe", (5, 13, 3, 43), (3, 43, 130)),
    ("...bc,cd->...bd", (2, 2, 3, 43), (43, 130)),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("equation", "shape", "of_kernel"),
    [*EQUATIONS, ("bquh,uhm->bqm", (2, 3, 3, 43), (3, 43, 130))],
)
def test_an_equation_keeps_its_values(equation, shape, of_kernel, dtype):
    """The last one's axes einsum sums in the alphabet's order."""
    x, w = einsum_operands(shape, of_kernel, dtype)
    for run in (lambda f: f, jax.jit):
        actual = run(lambda x, w: _compat.matmul_of_frozen(x, w, equation))(x, w)
        expected = run(lambda x, w: keras.ops.einsum(equation, x, w))(x, w)
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("equation", "shape", "of_kernel"), EQUATIONS)
def test_an_equation_has_einsums_gradient_and_moves_no_kernel_for_it(equation, shape, of_kernel):
    """Einsum moves a kernel of three axes in memory: the control."""
    x, w = einsum_operands(shape, of_kernel)
    products = {
        "ours": lambda x, w: _compat.matmul_of_frozen(x, w, equation),
        "einsum": lambda x, w: keras.ops.einsum(equation, x, w),
    }
    gradients, moved = {}, {}
    for name, product in products.items():
        gradient = jax.jit(jax.grad(lambda x, w, product=product: jnp.sum(jnp.sin(product(x, w)))))
        gradients[name] = gradient(x, w)
        moved[name] = values_of_size(w.size, gradient.lower(x, w).compile().as_text())
    assert_close(gradients["ours"], gradients["einsum"], FLOAT32_LAYER)
    assert abs(gradients["ours"]).max() > 0.1
    assert not moved["ours"]
    assert len(of_kernel) < 3 or moved["einsum"]


def einsum_operands(shape, of_kernel, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=size), dtype) for size in (shape, of_kernel)]


def values_of_size(size, text):
    """Returns the operations in XLA's text that form so many numbers."""
    found = []
    for shape, operation in re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", text):
        if math.prod(map(int, shape.split(","))) == size:
            found.append(operation)
    return [each for each in found if each not in ("parameter", "bitcast")]


@pytest.mark.parametrize(("tokens", "mirrored"), [(64, True), (65, False)])
def test_xla_forms_the_mirror_for_few_tokens(tokens, mirrored):
    """(130, tokens) is the shape of `W g^T`; `matmul` itself never has it: the control."""
    x, w, weights = operands((tokens, 130))
    found = {}
    for product in (_compat.matmul_of_frozen, keras.ops.matmul):
        gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
        text = gradient.lower(product, x, w, weights).compile().as_text()
        found[product] = f"f32[130,{tokens}]" in text
    assert found == {_compat.matmul_of_frozen: mirrored, keras.ops.matmul: False}


def test_only_the_cpu_is_known_to_gain(monkeypatch):
    x, w, _ = operands((4, 7))

    def is_mirrored():
        # A function of its own each time: jax remembers what it traced.
        return "optimization_barrier" in str(jax.make_jaxpr(lambda x: gradient(x, w))(x))

    assert is_mirrored()
    with monkeypatch.context() as changed:
        changed.setattr(jax, "default_backend", lambda: "gpu")
        assert not is_mirrored()
    monkeypatch.setattr(frozen, "MIRRORED_TOKENS", 3)
    assert not is_mirrored()


def gradient(x, w):
    return jax.grad(lambda x: jnp.sum(_compat.matmul_of_frozen(x, w) ** 2))(x)


def test_forward_mode_and_mapping():
    x, w, _ = operands((2, 3, 7))
    tangent = jnp.ones_like(x)
    _, pushed = jax.jvp(lambda x: _compat.matmul_of_frozen(x, w), (x,), (tangent,))
    assert_close(pushed, tangent @ w, FLOAT32_LAYER)
    mapped = jax.vmap(gradient, in_axes=(0, None))(x, w)
    assert_close(mapped, 2 * (x @ w) @ w.T, FLOAT32_LAYER)
    curvature = jax.hessian(lambda x: jnp.sum(_compat.matmul_of_frozen(x, w) ** 2))(x[0, :1])
    assert_close(curvature[0, :, 0], 2 * w @ w.T, FLOAT32_LAYER)


def test_inputs_of_unknown_size():
    w = operands((2, 7))[1]
    sizes = jax.export.symbolic_shape("b, 7")
    exported = jax.export.export(jax.jit(lambda x: _compat.matmul_of_frozen(x, w)))(
        jax.ShapeDtypeStruct(sizes, "float32")
    )
    x = operands((5, 7))[0]
    assert_close(exported.call(x), x @ w, FLOAT32_LAYER)
    assert _compat.matmul_of_frozen(keras.KerasTensor((None, 7)), w).shape == (None, 11)


def test_an_equation_with_inputs_of_unknown_size():
    equation, of_kernel = EQUATIONS[1][0], EQUATIONS[1][2]
    w = einsum_operands((1,), of_kernel)[1]
    sizes = jax.export.symbolic_shape("b, t, 3, 43")
    exported = jax.export.export(jax.jit(lambda x: _compat.matmul_of_frozen(x, w, equation)))(
        jax.ShapeDtypeStruct(sizes, "float32")
    )
    x = einsum_operands((2, 5, 3, 43), of_kernel)[0]
    assert_close(exported.call(x), jnp.einsum(equation, x, w), FLOAT32_LAYER)
    symbolic = keras.KerasTensor((None, None, 3, 43))
    assert _compat.matmul_of_frozen(symbolic, w, equation).shape == (None, None, 130)
