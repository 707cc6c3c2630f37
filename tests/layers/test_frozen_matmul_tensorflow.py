"""TensorFlow: a product with a frozen matrix, whose gradient is formed as a batch of one."""

import keras
import numpy as np
import pytest

from keras_loraplus import _compat

if keras.backend.backend() != "tensorflow":
    pytest.skip("the other backends take `matmul` as it is", allow_module_level=True)

import tensorflow as tf  # noqa: E402

SHAPES = [(5, 7), (2, 3, 7), (2, 1, 3, 7), (0, 7), (67, 130)]


def operands(shape, dtype="float64"):
    """Returns inputs, a matrix, and a weight for each output."""
    rng = np.random.default_rng(0)
    n, m = shape[-1], 11 if shape[-1] == 7 else 257
    shapes = (shape, (n, m), (*shape[:-1], m))
    return [tf.constant(rng.normal(size=shape), dtype) for shape in shapes]


def gradients(product, x, w, weights):
    """Returns the outputs, the inputs' gradient, and the gradient of that by the weights."""
    with tf.GradientTape() as outer:
        outer.watch(weights)
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = product(x, w)
            loss = tf.reduce_sum(weights * tf.sin(outputs))
        first = tape.gradient(loss, x)
        squares = tf.reduce_sum(first**2)
    return outputs, first, outer.gradient(squares, weights)


@pytest.mark.parametrize("compiled", ["eager", "graph", "xla"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_matmul(shape, compiled):
    arguments = operands(shape)
    expected = gradients(keras.ops.matmul, *arguments)
    function = gradients
    if compiled != "eager":
        function = tf.function(gradients, jit_compile=compiled == "xla")
    actual = function(_compat.matmul_of_frozen, *arguments)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11)
        assert not one.shape.num_elements() or abs(one.numpy()).max() > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_bit_of_the_values_changes(shape, dtype):
    x, w, _ = operands(shape, dtype)
    np.testing.assert_array_equal(_compat.matmul_of_frozen(x, w), keras.ops.matmul(x, w))


@pytest.mark.parametrize("of_kernel", ["float32", "bfloat16"])
def test_the_gradient_has_the_dtype_of_the_inputs(of_kernel):
    x, w, weights = operands((2, 3, 7), "bfloat16")
    w = tf.cast(w, of_kernel)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = _compat.matmul_of_frozen(x, w)
    gradient = tape.gradient(outputs, x, tf.cast(weights, outputs.dtype))
    exact = np.asarray(weights, "float64") @ np.asarray(w, "float64").T
    assert gradient.dtype == tf.bfloat16
    np.testing.assert_allclose(np.asarray(gradient, "float64"), exact, rtol=0.02, atol=0.02)


def test_the_gradient_is_a_batch_of_one_and_the_kernel_has_none():
    """With `matmul` itself it is not: the control."""
    x, w, weights = operands((2, 3, 7))
    found = {}
    for product in (keras.ops.matmul, _compat.matmul_of_frozen):

        def both(x, w, weights, product=product):
            with tf.GradientTape() as tape:
                tape.watch([x, w])
                outputs = product(x, w)
            return [g for g in tape.gradient(outputs, [x, w], weights) if g is not None]

        graph = tf.function(both).get_concrete_function(x, w, weights)
        kinds = [operation.type for operation in graph.graph.get_operations()]
        found[product] = (len(graph.outputs), sum(kind.startswith("Batch") for kind in kinds))
    assert found == {keras.ops.matmul: (2, 0), _compat.matmul_of_frozen: (1, 1)}


def test_forward_mode():
    x, w, _ = operands((2, 3, 7))
    tangent = tf.ones_like(x)
    with tf.autodiff.ForwardAccumulator(x, tangent) as accumulator:
        outputs = _compat.matmul_of_frozen(x, w)
    np.testing.assert_allclose(accumulator.jvp(outputs), keras.ops.matmul(tangent, w), rtol=1e-12)


def test_inputs_of_unknown_size_and_sparse_ones():
    x, w, weights = operands((2, 3, 7))
    signature = [tf.TensorSpec((None, None, 7), x.dtype)]

    @tf.function(input_signature=signature)
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = _compat.matmul_of_frozen(x, w)
        return tape.gradient(outputs, x, weights)

    np.testing.assert_allclose(gradient(x), keras.ops.matmul(weights, tf.transpose(w)), rtol=1e-12)
    sparse = tf.sparse.from_dense(x[0])
    np.testing.assert_allclose(
        _compat.matmul_of_frozen(sparse, w), keras.ops.matmul(x[0], w), rtol=1e-12
    )
    unranked = tf.function(
        _compat.matmul_of_frozen, input_signature=[tf.TensorSpec(None, x.dtype)] * 2
    )
    np.testing.assert_allclose(unranked(x, w), keras.ops.matmul(x, w), rtol=1e-12)
    symbolic = _compat.matmul_of_frozen(keras.KerasTensor((None, 7)), w)
    assert symbolic.shape == (None, 11)
