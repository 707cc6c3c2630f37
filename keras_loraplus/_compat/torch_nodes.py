"""What our own nodes of torch's graph share: when one may stand in it, and the frozen product."""

import functools

import keras

from keras_loraplus._compat.torch_optimizers import torch_values

# Multiplications of a product from which on oneDNN's call is worth it.
ONEDNN_FROM = 2**23


def tensors(operands):
    """Returns the operands with the tensor in place of each variable."""
    values = iter(torch_values([each for each in operands if isinstance(each, keras.Variable)]))
    return [next(values) if isinstance(each, keras.Variable) else each for each in operands]


def may_be_a_node(*tensors):
    """Whether a function of these alone, with a gradient of our own, is what torch records."""
    import torch
    from torch.autograd import forward_ad

    return (
        are_plain(*tensors)
        and tensors[0].dtype.is_floating_point
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def are_plain(*tensors):
    """Whether all are torch's own tensors, of one dtype."""
    import torch

    dtype = tensors[0].dtype
    return all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.dtype == dtype
        for tensor in tensors
    )


def frozen_product(equation, inputs, rows, kernel):
    """Returns the inputs, also given as rows (tokens, n), times the kernel as rows (tokens, m).

    It is what `matmul` and `einsum` come to for a matrix that trains, without their search for it;
    inputs that are swapped in memory they multiply otherwise by one that does not.
    """
    import torch

    if equation is None:
        return torch.mm(rows, kernel)
    width = kernel.numel() // rows.shape[1]
    if sums_in_order(equation):
        batch = kernel.reshape(1, rows.shape[1], width)
        return torch.bmm(rows.unsqueeze(0), batch).squeeze(0)
    return torch.einsum(equation, inputs, kernel).reshape(-1, width)


def sums_in_order(equation):
    """Whether einsum sums the contracted axes as they stand: torch and JAX sort them first."""
    contracted = contracted_axes(equation)
    return contracted == "".join(sorted(contracted))


@functools.cache
def contracted_axes(equation):
    """Returns the kernel's axes that an equation sums over, in the kernel's order."""
    kernel, outputs = equation.split(",")[1].split("->")
    return "".join(axis for axis in kernel if axis.isalpha() and axis not in outputs)


def is_onednn_faster(tokens, matrix):
    """Whether oneDNN can form so many rows times the matrix transposed, and faster than torch does.

    From this size on it takes 50 to 92 % of the time that MKL takes (torch 2.13.0, AMD EPYC, 8 to
    2,048 rows, matrices 384 to 4,096 wide; 101 % for 2,048 rows and 384 x 384), a call's 13
    microseconds of its own included.
    """
    import torch

    return (
        tokens * matrix.numel() >= ONEDNN_FROM
        and matrix.dtype == torch.float32
        and matrix.device.type == "cpu"
        and _onednn_linear() is not None
        and torch.backends.mkldnn.enabled
    )


def by_onednn(rows, matrix):
    return _onednn_linear()(rows, matrix, None, "none", [], "")


@functools.cache
def _onednn_linear():
    """Returns oneDNN's product with a transposed matrix, or None where torch was built without.

    torch's compiler uses this operator, which is private and has no gradient: checked on 2.13.0.
    """
    import torch

    if not torch.backends.mkldnn.is_available():
        return None
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return operator and operator.default
