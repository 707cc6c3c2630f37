"""The products of a layer, arranged for each backend so that their gradients are fast."""

import functools

import keras
from keras.src import backend as keras_backend  # private: checked on 3.15.1

from keras_loraplus._compat.jax_gradients import with_mirrored_gradient
from keras_loraplus._compat.torch_nodes import (
    are_plain,
    by_onednn,
    frozen_product,
    is_onednn_faster,
    may_be_a_node,
    tensors,
)


def thin_product(inputs, a):
    """Returns inputs (tokens, n) times A (n, r), arranged so that all its gradients are fast.

    On JAX (0.10.2, CPU) the gradient of A is formed as its mirror `(g^T x)^T`; as autodiff leaves
    it, `x^T g`, it runs several times slower.

    On torch (2.13.0, CPU) the gradient of a product with few columns takes half as long again as
    that of its mirror with few rows, `(A^T x^T)^T`. torch forms gradients in the memory order of
    the operands, so that from the mirror on those of A and of the inner value are mirrors as well:
    a `Dense` layer's step is 1 to 6 % shorter. Without gradients the mirror only costs a copy of A.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        if torch.is_grad_enabled():
            mirrored = keras.ops.transpose(a).contiguous()
            return keras.ops.transpose(keras.ops.matmul(mirrored, keras.ops.transpose(inputs)))
    elif backend == "jax" and not isinstance(a, keras.KerasTensor):
        a = with_mirrored_gradient(a)
    return keras.ops.matmul(inputs, a)


def adapted_product(equation, inputs, kernel, bias, a, b, scale, is_transposed=False):
    """Returns `inputs W + s (inputs A) B + bias`, in one node of torch's graph, or None.

    As torch (2.13.0) records it, the inputs get two gradients, which are then added into memory of
    their own, `addmm` copies the outputs that it adds to, and the bias is added into a third
    memory. Here all of it happens in place, and what is small, the scaled B and the casts, is no
    node of its own: the adapters of a BERT 1024 wide added 12 % to the frozen model's step on the
    CPU when they were recorded. Without gradients the same products are formed, so that a model's
    outputs are the same in training and in inference.

    The frozen product is the layer's own, bit for bit: `mm` in place of einsum's `bmm` rounds
    otherwise at small sizes. The bias is no row of B: a float32 product may be set to round its
    operands.

    None is returned, and the caller records the products, wherever this node has no rule or nothing
    to win: other backends, forward mode, `torch.func`, `torch.compile`, tracing, autocast, other
    dtypes and tensor classes, and kernels whose contracted axes do not come first.

    Args:
        equation: An einsum equation that is a product of matrices, or None for that of matrices.
        inputs: Tensor (..., n), or with as many axes for n as A has.
        kernel: The frozen matrix, of n times m entries in this order; it gets no gradient.
        bias: What is added last, in a shape that broadcasts, or None.
        a: A (n, r) or with the axes of n.
        b: B (r, m) or with the axes of m.
        scale: s, a tensor of A's dtype, which gets no gradient.
        is_transposed: Whether the kernel is a matrix (m, n), as the table behind tied logits.
    """
    if keras_backend.backend() != "torch":
        return None
    import torch

    inputs, kernel, bias, a, b, scale = tensors((inputs, kernel, bias, a, b, scale))
    kernel = kernel.t() if is_transposed else kernel
    if not may_be_a_node(*((inputs, kernel) if bias is None else (inputs, kernel, bias))):
        return None
    if not are_plain(a, b, scale):
        return None
    if torch.is_grad_enabled():
        return _torch_adapted_product().apply(equation, inputs, kernel, bias, a, b, scale)
    return _product(equation, inputs, kernel, bias, a, b, scale)[0]


@functools.cache
def _torch_adapted_product():
    import torch

    class AdaptedProduct(torch.autograd.Function):
        """Values with r columns are formed as their mirrors, as in `thin_product`."""

        @staticmethod
        def forward(ctx, equation, inputs, kernel, bias, a, b, scale):
            outputs, inner, up = _product(equation, inputs, kernel, bias, a, b, scale)
            _, wants_inputs, _, wants_bias, wants_a, wants_b, _ = ctx.needs_input_grad
            ctx.input_shape, ctx.bias_shape = inputs.shape, bias.shape if wants_bias else None
            # What is not needed must not be kept alive.
            ctx.save_for_backward(
                inputs if wants_a or wants_b else None,
                kernel if wants_inputs else None,
                a,
                b,
                scale,
                up if wants_inputs or wants_a else None,
                inner if wants_b else None,
            )
            return outputs

        @staticmethod
        def backward(ctx, upstream):
            inputs, kernel, a, b, scale, up, inner = ctx.saved_tensors
            _, wants_inputs, _, wants_bias, wants_a, wants_b, _ = ctx.needs_input_grad
            of_inputs = of_bias = of_a = of_b = None
            if torch.is_grad_enabled():  # gradients of gradients depend on how these were formed
                up = _scaled_matrix(b, scale, upstream.dtype)
                inner = _mirrored_inner(_rows(inputs, a), a) if wants_b else None
            if wants_bias:
                of_bias = upstream.sum_to_size(ctx.bias_shape)
            upstream = upstream.reshape(-1, b.numel() // b.shape[0])
            if wants_b:
                of_b = torch.mm(inner, upstream).to(b.dtype).mul_(scale).reshape(b.shape)
            if wants_inputs or wants_a:
                back = torch.mm(up, upstream.t())  # (r, tokens)
            if wants_a:
                of_a = _gradient_of_a(back, _rows(inputs, a), a)
            if wants_inputs:
                of_inputs = _gradient_of_inputs(upstream, kernel, back, a)
                of_inputs = of_inputs.reshape(ctx.input_shape)
            return None, of_inputs, None, of_bias, of_a, of_b, None

    return AdaptedProduct


def _product(equation, inputs, kernel, bias, a, b, scale):
    """Returns the outputs, `(x A)^T` (r, tokens) and `s B` (r, m), formed without gradients."""
    import torch

    rows, up = _rows(inputs, a), _scaled_matrix(b, scale, inputs.dtype)
    # First, while the inputs are in the cache.
    inner = _mirrored_inner(rows, a)
    outputs = frozen_product(equation, inputs, rows, kernel)
    outputs.addmm_(inner.t(), up)
    shape = [*inputs.shape[: inputs.ndim - a.ndim + 1], *b.shape[1:]]
    # A user's own operation in place on the outputs is none of this node's.
    outputs = torch.ops.aten._unsafe_view(outputs, shape)
    if bias is not None:
        outputs.add_(bias)
    return outputs, inner, up


def _mirrored_inner(rows, a):
    """Returns `(x A)^T` (r, tokens): so formed it is up to a third faster on torch 2.13.0 (CPU)."""
    return _matrix(a, rows.dtype).t() @ rows.t()


def _rows(inputs, a):
    """Returns the inputs as a matrix (tokens, n)."""
    return inputs.reshape(-1, a.numel() // a.shape[-1])


# A call that changes nothing takes 1 to 2 microseconds, of which a step makes some hundred.


def _matrix(a, dtype):
    """Returns A as a matrix (n, r)."""
    a = a if a.ndim == 2 else a.reshape(-1, a.shape[-1])
    return a if a.dtype == dtype else a.to(dtype)


def _scaled_matrix(b, scale, dtype):
    """Returns s B as a matrix (r, m), scaled before the cast."""
    scaled = (b if b.ndim == 2 else b.reshape(b.shape[0], -1)) * scale
    return scaled if scaled.dtype == dtype else scaled.to(dtype)


def _gradient_of_a(back, rows, a):
    """Returns the gradient of A from that of `x A`, mirrored (r, tokens).

    The mirror `g^T x` is several times faster than `x^T g`, but has to be copied into A's order in
    memory, which takes as long for any number of tokens. On torch 2.13.0 (CPU) the copy pays from
    16 tokens for each unit of the rank on.
    """
    if rows.shape[0] < 16 * back.shape[0]:
        gradient = rows.t() @ back.t()
    else:
        gradient = (back @ rows).t()
    return gradient.to(a.dtype).reshape(a.shape)


def _gradient_of_inputs(upstream, kernel, back, a):
    """Returns `g W^T + (g B^T) A^T` from g (tokens, m) and `(g B^T)^T` (r, tokens)."""
    import torch

    down = _matrix(a, upstream.dtype)
    matrix = kernel.reshape(down.shape[0], -1)
    if is_onednn_faster(upstream.shape[0], matrix) and not torch.is_grad_enabled():
        return by_onednn(upstream, matrix).addmm_(back.t(), down.t())
    # The small product first: the large one adds to it at no cost.
    return torch.mm(back.t(), down.t()).addmm_(upstream, matrix.t())


def add_product(outputs, inner, b):
    """Returns outputs (..., m) plus the product of inner (tokens, r) and B (r, m).

    On torch (2.13.0) in one kernel, where dtypes are equal; the product alone takes longer, since
    it is written and read again.
    """
    if keras.backend.backend() == "torch" and outputs.dtype == inner.dtype == b.dtype:
        import torch

        return torch.addmm(outputs.reshape(-1, b.shape[-1]), inner, b).reshape(outputs.shape)
    product = keras.ops.matmul(inner, b)
    return keras.ops.add(outputs, keras.ops.reshape(product, keras.ops.shape(outputs)))
