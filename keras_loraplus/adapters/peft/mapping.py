"""A layer's A and B here, and `lora_A` and `lora_B` of a Hugging Face module (pure numpy)."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a flattened kernel (inputs, outputs) lies in a Hugging Face matrix.

    Attributes:
        inputs: For every input of the kernel its position among the module's inputs.
        outputs: For every output of the kernel its position among the module's outputs.
        fan_in: Number of inputs of the module.
        fan_out: Number of outputs of the module.
        transposed: Whether the Hugging Face matrix is (inputs, outputs), as in `Conv1D` and
            `Embedding`, and not (outputs, inputs), as in `Linear`.
        window: Sizes that the module's tensors have beyond inputs and outputs, a convolution's.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    fan_in: int
    fan_out: int
    transposed: bool
    window: tuple = ()

    def a_shape(self, rank):
        """Returns the shape of the module's `lora_A`: that of the weight with `rank` outputs."""
        channels = self.fan_in // math.prod(self.window)
        return (rank, channels, *self.window)

    def b_shape(self, rank):
        """Returns the shape of the module's `lora_B`, in a convolution one of a window of 1."""
        return (self.fan_out, rank, *(1 for _ in self.window))


def layout_of(index, contracted, free, hf_shape):
    """Finds the layout of a kernel whose entries' positions are known.

    Args:
        index: Integers of the kernel's shape, positions in the flattened Hugging Face matrix.
        contracted: Axes of the kernel that the layer's input contracts.
        free: The other axes.
        hf_shape: Shape (rows, columns) of the Hugging Face matrix, or (filters, channels, *window)
            of a convolution's weight.

    Returns:
        A `Layout`.

    Raises:
        ValueError: If rows and columns are not products of contracted and free axes, so that no
            pair of thin matrices there does what A and B do here.

    Example:
        >>> layout = layout_of(np.arange(6).reshape(3, 2).T, (0,), (1,), (3, 2))
        >>> layout.inputs.tolist(), layout.outputs.tolist(), layout.transposed
        ([0, 1], [0, 1, 2], False)
    """
    if len(hf_shape) < 2:
        raise ValueError("it has one axis in the checkpoint, where at least 2 are expected")
    window, inputs = tuple(hf_shape[2:]), math.prod(hf_shape[1:])
    sizes = [index.shape[axis] for axis in contracted]
    flat = np.transpose(index, (*contracted, *free)).reshape(math.prod(sizes), -1)
    rows, columns = np.divmod(flat, inputs)
    if _one_each(rows, axis=1) and _one_each(columns, axis=0):
        return Layout(columns[:, 0], rows[0], inputs, hf_shape[0], False, window)
    if not window and _one_each(rows, axis=0) and _one_each(columns, axis=1):
        return Layout(rows[:, 0], columns[0], hf_shape[0], hf_shape[1], True)
    raise ValueError("its rows and columns mix inputs and outputs of the layer")


def _one_each(values, axis):
    """Whether values (inputs, outputs) depend on one axis alone: 0, inputs, or 1, outputs."""
    return bool((values == (values[:1] if axis == 1 else values[:, :1])).all())


def to_peft(layout, a, b):
    """Returns `lora_A` (r, fan_in) and `lora_B` (fan_out, r), flat, for A and B of a layer.

    Args:
        layout: The `Layout`.
        a: A, the contracted axes and then the rank.
        b: B, the rank and then the free axes.
    """
    rank = a.shape[-1]
    lora_a = np.zeros((rank, layout.fan_in), a.dtype)
    lora_b = np.zeros((layout.fan_out, rank), b.dtype)
    lora_a[:, layout.inputs] = a.reshape(-1, rank).T
    lora_b[layout.outputs] = b.reshape(rank, -1).T
    return lora_a, lora_b


def from_peft(layout, lora_a, lora_b, a_shape, b_shape):
    """Returns A and B of a layer for a module's `lora_A` and `lora_B`."""
    lora_a = lora_a.reshape(lora_a.shape[0], -1)
    lora_b = lora_b.reshape(lora_b.shape[0], -1)
    a = np.ascontiguousarray(lora_a[:, layout.inputs].T).reshape(a_shape)
    b = np.ascontiguousarray(lora_b[layout.outputs].T).reshape(b_shape)
    return a, b


def fused(parts):
    """Joins the adapters of several layers that are one module on the other side.

    The sum of products is one product of the sum of the ranks, exactly. Where the scales differ,
    B takes the difference.

    Args:
        parts: List of (lora_A, lora_B, scale).

    Returns:
        Tuple (lora_A, lora_B, scale).
    """
    scale = parts[0][2]
    lora_a = np.concatenate([a for a, _, _ in parts], axis=0)
    lora_b = np.concatenate([b * b.dtype.type(s / scale) for _, b, s in parts], axis=1)
    return lora_a, lora_b, scale
