"""Splits an einsum layer's equation into the two thin products of an adapter (pure)."""

import dataclasses
import functools
import math
import string


@dataclasses.dataclass(frozen=True)
class EinsumSplit:
    """The equations and axes that replace `equation` for a rank-r adapter.

    Attributes:
        down: Equation `input,A->inner`.
        up: Equation `inner,B->output`.
        delta: Equation `A,B->kernel`, the product that merging adds to the kernel.
        a_axes: Kernel letters of A, in A's order; the rank axis follows them.
        b_axes: Letters of B, in B's order; one of them is `rank_axis`.
        rank_axis: The letter chosen for the rank.
        contracted: Kernel letters that the input contracts (A's fan-in).
        free: Kernel letters that only the output has (B's fan-out).
        shared: Letters that input, kernel and output have (experts, heads).
        is_matmul: Whether both products are those of matrices once axes are merged: the input ends
            with the contracted axes, the output with the free ones, in the kernel's order.
    """

    down: str
    up: str
    delta: str
    a_axes: str
    b_axes: str
    rank_axis: str
    contracted: str
    free: str
    shared: str
    is_matmul: bool

    def shapes(self, kernel_axes, kernel_shape, rank):
        """Returns the shapes of A and B for a kernel of `kernel_shape`.

        Args:
            kernel_axes: The kernel's letters, as `kernel_axes(equation)` gives them.
            kernel_shape: The kernel's sizes.
            rank: The adapter's rank.

        Returns:
            Tuple `(a_shape, b_shape)`.
        """
        size = dict(zip(kernel_axes, kernel_shape, strict=True))
        size[self.rank_axis] = rank
        return (
            tuple(size[axis] for axis in self.a_axes + self.rank_axis),
            tuple(size[axis] for axis in self.b_axes),
        )

    def fan_in(self, kernel_axes, kernel_shape):
        """Returns the number of inputs that A contracts."""
        return _product(self.contracted, kernel_axes, kernel_shape)

    def fan_out(self, kernel_axes, kernel_shape):
        """Returns the number of outputs that B produces."""
        return _product(self.free, kernel_axes, kernel_shape)


def kernel_axes(equation):
    """Returns the letters of the kernel in an equation `input,kernel->output`.

    Example:
        >>> kernel_axes("bqm,muh->bquh")
        'muh'
    """
    return _parse(equation)[1]


@functools.cache
def split_einsum(equation, groups=""):
    """Splits `input,kernel->output` at a rank axis.

    With the kernel's letters sorted by where else they occur:

        input only:        contracted, they go to A
        output only:       free, they go to B
        input and output:  shared (experts, heads), they go to both

        inner = einsum(input, A)      A: (shared and contracted, in kernel order) + (r,)
        output += s einsum(inner, B)  B: shared + (r,) + free, each in kernel order

    so that neither product has the kernel's size. This is the factorisation of the
    torch reference for the flattened kernel (contracted, free), unlike Keras's own
    `EinsumDense.enable_lora`, which splits off the kernel's last axis.

    Args:
        equation: An equation of `keras.layers.EinsumDense`; the input and the output
            may hold one ellipsis.
        groups: Letters of kernel and output that are shared although the input does not have
            them: every expert has factors of its own and gets the same input.

    Returns:
        An `EinsumSplit`.

    Raises:
        ValueError: If the equation has no contracted or no free kernel axis, repeats a
            letter in the kernel, or sums a kernel axis that the input does not have:
            no two thin products exist for it.

    Example:
        >>> split = split_einsum("bqm,muh->bquh")
        >>> split.down, split.up
        ('bqm,ma->bqa', 'bqa,auh->bquh')
        >>> split_einsum("eti,eih->eth").up
        'eta,eah->eth'
        >>> split = split_einsum("th,ehm->etm", groups="e")
        >>> split.down, split.up
        ('th,eha->eta', 'eta,eam->etm')

    Source: Hu et al., arXiv 2106.09685, written for einsum kernels.
    """
    inputs, kernel, outputs = _parse(equation)
    given = inputs + groups
    shared = _kept(kernel, lambda axis: axis in given and axis in outputs)
    contracted = _kept(kernel, lambda axis: axis in inputs and axis not in outputs)
    free = _kept(kernel, lambda axis: axis not in given and axis in outputs)
    alone = _kept(kernel, lambda axis: axis not in inputs and axis not in outputs)
    if len(set(kernel)) != len(kernel):
        raise ValueError(f"The kernel repeats an axis. Received: equation={equation!r}.")
    if alone:
        raise ValueError(
            f"Kernel axes {list(alone)} occur neither in the input nor in the output. "
            f"Received: equation={equation!r}."
        )
    if not contracted or not free:
        missing = "contracts no kernel axis" if not contracted else "has no free kernel axis"
        raise ValueError(
            f"An adapter needs a contracted and a free kernel axis; the equation {missing}. "
            f"Received: equation={equation!r}."
        )
    rank_axis = next(
        letter for letter in string.ascii_letters if letter not in inputs + kernel + outputs
    )
    a_axes = _kept(kernel, lambda axis: axis in shared + contracted)
    b_axes = shared + rank_axis + free
    inner = "".join(part for part in _tokens(inputs) if part == "..." or part in outputs)
    inner = _kept(shared, lambda axis: axis not in inputs) + inner + rank_axis
    batch = _tokens(inner)[:-1]
    is_matmul = (
        not shared
        and _tokens(inputs) == [*batch, *contracted]
        and _tokens(outputs) == [*batch, *free]
    )
    return EinsumSplit(
        down=f"{inputs},{a_axes}{rank_axis}->{inner}",
        up=f"{inner},{b_axes}->{outputs}",
        delta=f"{a_axes}{rank_axis},{b_axes}->{kernel}",
        a_axes=a_axes,
        b_axes=b_axes,
        rank_axis=rank_axis,
        contracted=contracted,
        free=free,
        shared=shared,
        is_matmul=is_matmul,
    )


def _parse(equation):
    try:
        operands, outputs = equation.replace(" ", "").split("->")
        inputs, kernel = operands.split(",")
    except (AttributeError, ValueError):
        raise ValueError(
            "An einsum equation must have the form 'input,kernel->output'. "
            f"Received: equation={equation!r}."
        ) from None
    return inputs, kernel, outputs


def _tokens(axes):
    head, ellipsis, tail = axes.partition("...")
    return [*head, *([ellipsis] if ellipsis else []), *tail]


def _kept(axes, condition):
    return "".join(axis for axis in axes if condition(axis))


def _product(letters, axes, shape):
    size = dict(zip(axes, shape, strict=True))
    return math.prod(size[axis] for axis in letters)
