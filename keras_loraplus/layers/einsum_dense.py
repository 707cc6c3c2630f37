"""`keras.layers.EinsumDense` with a frozen kernel and a low-rank adapter."""

import keras
from keras import ops

from keras_loraplus.layers.base import LowRankLayer
from keras_loraplus.layers.einsum_split import kernel_axes, split_einsum
from keras_loraplus.layers.factors import Factor, Factors
from keras_loraplus.layers.initial import factor_initializers


@keras.saving.register_keras_serializable("keras_loraplus")
class LoRAPlusEinsumDense(LowRankLayer, keras.layers.EinsumDense):
    """An einsum layer that trains two thin tensors beside a frozen kernel.

        y = activation(einsum(x, W) + s einsum(einsum(x, A), B) + bias),    s = alpha / rank

    The kernel's axes are split by the equation (`split_einsum`): those the input contracts go
    to A, those only the output has go to B, those all three have (experts) go to both. For
    `"bqm,muh->bquh"`, a query projection (384, 12, 32), A is (384, r) and B (r, 12, 32), as in
    the torch reference; Keras's own `enable_lora` would train A (384, 12, r).

    Args:
        *args: Arguments of `keras.layers.EinsumDense`: `equation`, `output_shape`.
        rank: Positive integer r. Defaults to 8.
        alpha: Strength; `None` means `rank`, a scale of 1.
        init: `"loraplus"`, `"lora"` or a pair of Keras initializers, as for `LoRAPlusDense`;
            the fan-in is the product of the contracted axes.
        scaling: `"standard"` (s = alpha / r) or `"rslora"` (s = alpha / sqrt(r)).
        dropout: Rate at which the adapter's input is dropped while training.
        max_rank: Rank up to which A and B have room, filled with zeros, for adapters of other
            ranks (`keras_loraplus.add_adapter`); `None` means `rank`.
        **kwargs: Further arguments of `keras.layers.EinsumDense`.

    Input shape:
        As the equation says.

    Output shape:
        As the equation says, in the compute dtype of the layer's policy.

    Variables:
        `kernel` frozen; `bias`; `lora_kernel_a` (shared and contracted axes, r) and
        `lora_kernel_b` (shared axes, r, free axes) float32; `lora_scaling` () frozen.

    Raises:
        ValueError: If a setting is out of range, or the equation has no two thin factors.

    Example:
        >>> layer = LoRAPlusEinsumDense("abc,cde->abde", output_shape=(None, 2, 5), rank=3)
        >>> _ = layer(keras.ops.ones((1, 4, 6)))
        >>> tuple(layer.lora_kernel_a.shape), tuple(layer.lora_kernel_b.shape)
        ((6, 3), (3, 2, 5))

    Source: Hu et al., arXiv 2106.09685, written for einsum kernels; arXiv 2402.12354.
    """

    plain_class = keras.layers.EinsumDense

    def _plan_factors(self, spec):
        split, axes = split_einsum(self.equation), kernel_axes(self.equation)
        shape = self._matrix_shape("_kernel")
        a_shape, b_shape = split.shapes(axes, shape, spec.rank)
        fan_in = split.fan_in(axes, shape)
        fan_out = split.fan_out(axes, shape)
        a_init, b_init = factor_initializers(spec.init, fan_in, spec.rank)
        where = {axis: position for position, axis in enumerate(axes)}
        a_axes = (*(where[axis] for axis in split.a_axes), None)
        b_axes = tuple(where.get(axis) for axis in split.b_axes)
        return [
            Factor("lora_kernel_a", a_shape, a_init, fan_in, a_axes),
            Factor("lora_kernel_b", b_shape, b_init, fan_out, b_axes),
        ]

    def _factors(self):
        split = split_einsum(self.equation)
        product = lambda a, b: ops.einsum(split.delta, a, b)  # noqa: E731
        return (Factors("_kernel", "lora_kernel_a", "lora_kernel_b", product, split),)

    @classmethod
    def why_not_adaptable(cls, layer):
        """Returns why a built `EinsumDense` cannot carry the adapter, or None."""
        try:
            split_einsum(layer.equation)
        except ValueError as error:
            return str(error)
        return super().why_not_adaptable(layer)

    def call(self, inputs, training=None):
        """Returns `activation(einsum(x, W) + s einsum(einsum(x, A), B) + bias)`."""
        split = split_einsum(self.equation)
        if split.is_matmul:
            in_order = kernel_axes(self.equation) == split.contracted + split.free
            outputs = self._adapted_product(inputs, training, self.equation, in_order)
        else:
            a, b = self._scaled(self.lora_kernel_a, self.lora_kernel_b)
            inner = ops.einsum(split.down, self._dropped(inputs, training), a)
            outputs = self._frozen_product(inputs, self.equation)
            outputs = self._plus_bias(ops.add(outputs, ops.einsum(split.up, inner, b)))
        return self._activated(outputs)
