"""Products with a frozen matrix: its own values, and a gradient of the inputs that is fast."""

import functools
import math

import keras
from keras.src import backend as keras_backend  # private: checked on 3.15.1

from keras_loraplus._compat.jax_gradients import with_mirrored_gradient
from keras_loraplus._compat.torch_nodes import (
    by_onednn,
    contracted_axes,
    frozen_product,
    is_onednn_faster,
    may_be_a_node,
    sums_in_order,
    tensors,
)

# Tokens up to which the mirrored gradient is worth it on JAX.
MIRRORED_TOKENS = 64


def matmul_of_frozen(inputs, kernel, equation=None):
    """Returns inputs (..., n) times a matrix (n, m) that gets no gradient.

    The values are those of `matmul`, or of an einsum equation that is a product of matrices and
    whose kernel's axes are in order, those that are contracted first. The gradient of the inputs,
    `g W^T`, is formed faster (CPU; kernels 384 to 4,096 wide):

    - On torch oneDNN forms it.
    - TensorFlow (2.21.0), without an equation: it takes another kernel for a batch of one matrix,
      at 1024 x 4096 and 256 tokens in 68 % of the time, at 2048 x 2048 and 32 tokens in 35 %, at
      384 x 384 and 2,048 in 101 %. An einsum is a batch already.
    - JAX (0.10.2): XLA forms `(W g^T)^T` of 8 to 32 tokens in 48 to 82 %, of 64 in 70 to 104 %, and
      of 256 and more in 94 to 125 %.
    - JAX, an equation: for an einsum that contracts two axes, in either direction, XLA moves the
      kernel in memory; for a matrix it does not. With the mirror, both directions of an attention's
      projection take 25 to 75 % of einsum's time for 8 and 32 tokens, 57 to 96 % for 64, 84 to 98 %
      for 256 and 92 to 99 % for 2,048. Einsum sums contracted axes in alphabetical order: where
      that is not the kernel's, it is left to it.
    """
    backend, is_known = keras_backend.backend(), not isinstance(inputs, keras.KerasTensor)
    if is_known and backend == "torch":
        return _torch_matmul(inputs, kernel, equation)
    if is_known and backend == "jax":
        return _jax_matmul(inputs, kernel, equation)
    if is_known and backend == "tensorflow" and equation is None:
        return _tensorflow_matmul(inputs, kernel)
    return _plain(inputs, kernel, equation)


def logits_of_frozen(inputs, table):
    """Returns inputs (..., n) times the transpose of a table (vocabulary, n) without a gradient.

    On torch oneDNN forms the gradient of the inputs, `g E`, as in `matmul_of_frozen`: of 8 to 1,024
    tokens, tables 384 to 1,024 wide, in 62 to 97 % of the time (torch 2.13.0, CPU). Of the same
    products a batch of one takes 101 to 118 % on TensorFlow and a mirror 90 to 98 % on JAX: both
    are left as they are.
    """
    kernel = keras.ops.transpose(table)
    if keras_backend.backend() == "torch" and not isinstance(inputs, keras.KerasTensor):
        return _torch_matmul(inputs, kernel, None)
    return keras.ops.matmul(inputs, kernel)


def _plain(inputs, kernel, equation):
    if equation is None:
        return keras.ops.matmul(inputs, kernel)
    return keras.ops.einsum(equation, inputs, kernel)


def _torch_matmul(inputs, kernel, equation):
    import torch

    inputs, kernel = tensors((inputs, kernel))
    if not may_be_a_node(inputs, kernel):
        return _plain(inputs, kernel, equation)
    contracted = 1 if equation is None else len(contracted_axes(equation))
    matrix = kernel.reshape(math.prod(kernel.shape[:contracted]), -1)
    rows = inputs.reshape(-1, matrix.shape[0])
    if torch.is_grad_enabled() and inputs.requires_grad and is_onednn_faster(rows.shape[0], matrix):
        outputs = _torch_frozen_product().apply(equation, inputs, rows, kernel, matrix)
    else:
        outputs = frozen_product(equation, inputs, rows, kernel)
    return outputs.reshape(*inputs.shape[: inputs.ndim - contracted], *kernel.shape[contracted:])


@functools.cache
def _torch_frozen_product():
    import torch

    class FrozenProduct(torch.autograd.Function):
        """Rows times a kernel, also given as a matrix (n, m), that gets no gradient."""

        @staticmethod
        def forward(ctx, equation, inputs, rows, kernel, matrix):
            ctx.save_for_backward(matrix)
            return frozen_product(equation, inputs, rows, kernel)

        @staticmethod
        def backward(ctx, upstream):
            (matrix,) = ctx.saved_tensors
            if torch.is_grad_enabled():
                back = torch.mm(upstream, matrix.t())
            else:
                back = by_onednn(upstream, matrix)
            return None, None, back, None, None

    return FrozenProduct


def _tensorflow_matmul(inputs, kernel):
    import tensorflow as tf

    if not isinstance(inputs, tf.Tensor) or (inputs.shape.rank or 0) < 2:
        return keras.ops.matmul(inputs, kernel)

    @tf.custom_gradient
    def product(x, w):
        def gradient(upstream):
            batch = tf.reshape(upstream, (1, -1, w.shape[-1]))
            back = tf.matmul(batch, tf.cast(w, upstream.dtype)[None], transpose_b=True)
            return tf.reshape(tf.cast(back, x.dtype), tf.shape(x)), None

        return keras.ops.matmul(x, w), gradient

    return product(inputs, kernel)


def _jax_matmul(inputs, kernel, equation):
    import jax

    if not isinstance(inputs, jax.Array) or not inputs.ndim or jax.default_backend() != "cpu":
        return _plain(inputs, kernel, equation)
    if equation is not None and not sums_in_order(equation):
        return _plain(inputs, kernel, equation)
    contracted = 1 if equation is None else len(contracted_axes(equation))
    others, free = inputs.shape[: inputs.ndim - contracted], kernel.shape[contracted:]
    kernel = keras.ops.reshape(kernel, (math.prod(kernel.shape[:contracted]), -1))
    if all(isinstance(size, int) for size in others) and math.prod(others) <= MIRRORED_TOKENS:
        inputs = with_mirrored_gradient(inputs.reshape(-1, kernel.shape[0]))
    else:
        inputs = inputs.reshape(*others, kernel.shape[0])
    return keras.ops.matmul(inputs, kernel).reshape(*others, *free)


def einsum_of_frozen(equation, inputs, kernel):
    """Returns an einsum whose second operand is a constant.

    TensorFlow (2.21) differentiates an einsum by both operands whatever is asked for; a compiled
    function drops what nobody reads, an eager one would form a gradient of the kernel's size.
    """
    ops = keras.ops
    operands, outputs = equation.replace(" ", "").split("->")
    first, second = operands.split(",")
    plain = keras_backend.backend() != "tensorflow" or isinstance(inputs, keras.KerasTensor)
    if plain or not set(first) <= set(second + outputs):
        return ops.einsum(equation, inputs, kernel)
    import tensorflow as tf

    inputs = ops.convert_to_tensor(inputs)

    @tf.custom_gradient
    def product(x):
        def gradient(upstream):
            back = ops.einsum(f"{outputs},{second}->{first}", upstream, kernel)
            return ops.cast(back, x.dtype)

        return ops.einsum(equation, x, kernel), gradient

    return product(inputs)
