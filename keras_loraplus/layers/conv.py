"""`keras.layers.Conv1D/2D/3D` with a frozen kernel and a low-rank adapter."""

import math

import keras
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.layers.base import LowRankLayer
from keras_loraplus.layers.factors import Factor, Factors
from keras_loraplus.layers.initial import factor_initializers
from keras_loraplus.layers.thin_conv import thin_convolution


class LowRankConv(LowRankLayer):
    """What the three convolutions share.

        y = activation(conv(x, W) + s conv(x, A) B + bias),    s = alpha / rank

    A is a convolution of r filters with the layer's own kernel size, stride, padding and dilation;
    B is a product over the r channels at every position. With `groups` > 1 every group shares A,
    and B's columns belong to the group of their filter, so that merging stays exact.
    """

    def _plan_factors(self, spec):
        *window, channels, filters = self._matrix_shape("_kernel")
        fan_in = channels
        for size in window:
            fan_in *= size
        a_init, b_init = factor_initializers(spec.init, fan_in, spec.rank)
        a_shape = (*window, channels, spec.rank)
        a_axes = (*range(len(window) + 1), None)
        return [
            Factor("lora_kernel_a", a_shape, a_init, fan_in, a_axes),
            Factor("lora_kernel_b", (spec.rank, filters), b_init, filters, (None, len(window) + 1)),
        ]

    def _factors(self):
        return (Factors("_kernel", "lora_kernel_a", "lora_kernel_b", ops.matmul),)

    def call(self, inputs, training=None):
        """Returns `activation(conv(x, W) + s conv(x, A) B + bias)`."""
        adapter_inputs = self._dropped(inputs, training)
        outputs = self._convolved(inputs, self._frozen(self.kernel))
        outputs = self._plus_low_rank(outputs, adapter_inputs)
        if self.use_bias:
            shape = [1] * (len(self.kernel_size) + 2)
            shape[self._channel_axis] = self.filters
            outputs = ops.add(outputs, ops.reshape(self.bias, shape))
        return self._activated(outputs)

    @property
    def _channel_axis(self):
        return 1 if self.data_format == "channels_first" else -1

    def _convolved(self, inputs, kernel):
        padding = self.padding
        if padding == "causal":
            pads = [[0, 0], [0, 0], [0, 0]]
            pads[1 if self._channel_axis == -1 else 2][0] = self.dilation_rate[0] * (
                self.kernel_size[0] - 1
            )
            inputs, padding = ops.pad(inputs, pads), "valid"
        return _compat.convolution(
            inputs,
            kernel,
            data_format=self.data_format,
            strides=list(self.strides),
            padding=padding,
            dilation_rate=self.dilation_rate,
        )

    def _inner(self, inputs, a):
        """Returns conv(x, A): as one product of matrices, where that is known to be faster."""
        *window, channels, rank = a.shape
        if (
            self._channel_axis == -1
            and all(stride == 1 for stride in self.strides)
            and math.prod(window) * rank <= channels
            and _compat.prefers_matrices(inputs)
        ):
            return thin_convolution(inputs, a, self.padding, self.dilation_rate)
        return self._convolved(inputs, a)

    def _plus_low_rank(self, outputs, inputs):
        """Returns `outputs + conv(x, A) B`."""
        a, b = self._scaled(self.lora_kernel_a, self.lora_kernel_b)
        groups = self.groups
        if groups == 1:
            inner = self._inner(inputs, a)
            if self._channel_axis == 1:
                return ops.add(outputs, ops.einsum("br...,rm->bm...", inner, b))
            # A product of matrices: TensorFlow's einsum makes the ResNet block's step 15 % longer.
            return _compat.add_product(outputs, ops.reshape(inner, (-1, b.shape[0])), b)
        # A is shared by the groups: they become part of the batch, so that no kernel of all groups
        # together has to be formed.
        inner = self._inner(self._groups_to_batch(inputs), a)
        b = ops.reshape(b, (b.shape[0], groups, self.filters // groups))
        inner = ops.reshape(inner, (-1, groups, *ops.shape(inner)[1:]))
        equation = "bgr...,rgm->bgm..." if self._channel_axis == 1 else "bg...r,rgm->b...gm"
        product = ops.einsum(equation, inner, b)
        return ops.add(outputs, ops.reshape(product, ops.shape(outputs)))

    def _groups_to_batch(self, inputs):
        groups, shape = self.groups, ops.shape(inputs)
        if self._channel_axis == 1:
            return ops.reshape(inputs, (-1, shape[1] // groups, *shape[2:]))
        spatial, channels = shape[1:-1], shape[-1]
        split = ops.reshape(inputs, (-1, *spatial, groups, channels // groups))
        last = len(shape)
        axes = (0, last - 1, *range(1, last - 1), last)
        return ops.reshape(ops.transpose(split, axes), (-1, *spatial, channels // groups))


_DOC = """A {n}D convolution that trains two thin tensors beside a frozen kernel.

        y = activation(conv(x, W) + s conv(x, A) B + bias),    s = alpha / rank

    Args:
        *args: Arguments of `keras.layers.Conv{n}D`: `filters`, `kernel_size`.
        rank: Positive integer r, the adapter's rank. Defaults to 8. (Keras stores the number of
            spatial dimensions as `layer.rank`; the adapter's rank is `layer.adapter.rank`.)
        alpha: Strength; `None` means `rank`, a scale of 1.
        init: `"loraplus"`, `"lora"` or a pair of Keras initializers, as for `LoRAPlusDense`; the
            fan-in is kernel size times input channels (of one group).
        scaling: `"standard"` (s = alpha / r) or `"rslora"` (s = alpha / sqrt(r)).
        dropout: Rate at which the adapter's input is dropped while training.
        max_rank: Rank up to which A and B have room, filled with zeros, for adapters of other
            ranks (`keras_loraplus.add_adapter`); `None` means `rank`.
        **kwargs: Further arguments of `keras.layers.Conv{n}D`, `groups` and `padding` included.

    Input shape:
        As `keras.layers.Conv{n}D`.

    Output shape:
        As `keras.layers.Conv{n}D`, in the compute dtype of the layer's policy.

    Variables:
        `kernel` frozen; `bias`; `lora_kernel_a` (kernel size, channels, r) and `lora_kernel_b`
        (r, filters) float32; `lora_scaling` () frozen.

    Raises:
        ValueError: If a setting is out of range, or the layer has a kernel constraint.

    Example:
        >>> layer = LoRAPlusConv{n}D(4, 3, rank=2)
        >>> layer(keras.ops.ones({shape})).shape[-1]
        4

    Source: Hu et al., arXiv 2106.09685; arXiv 2402.12354.
    """


@keras.saving.register_keras_serializable("keras_loraplus")
class LoRAPlusConv1D(LowRankConv, keras.layers.Conv1D):
    """A 1D convolution with a low-rank adapter."""

    plain_class = keras.layers.Conv1D
    __doc__ = _DOC.format(n=1, shape="(1, 8, 3)")


@keras.saving.register_keras_serializable("keras_loraplus")
class LoRAPlusConv2D(LowRankConv, keras.layers.Conv2D):
    """A 2D convolution with a low-rank adapter."""

    plain_class = keras.layers.Conv2D
    __doc__ = _DOC.format(n=2, shape="(1, 8, 8, 3)")


@keras.saving.register_keras_serializable("keras_loraplus")
class LoRAPlusConv3D(LowRankConv, keras.layers.Conv3D):
    """A 3D convolution with a low-rank adapter."""

    plain_class = keras.layers.Conv3D
    __doc__ = _DOC.format(n=3, shape="(1, 4, 4, 4, 3)")
