"""`keras.layers.Dense` with a frozen kernel and a low-rank adapter."""

import keras
from keras import ops

from keras_loraplus.layers.base import LowRankLayer
from keras_loraplus.layers.factors import Factor, Factors
from keras_loraplus.layers.initial import factor_initializers


@keras.saving.register_keras_serializable("keras_loraplus")
class LoRAPlusDense(LowRankLayer, keras.layers.Dense):
    """A dense layer that trains two thin matrices beside a frozen kernel.

        y = activation(x W + s (x A) B + bias),    s = alpha / rank

        x (..., n) --- W (n, m), frozen ----------------+--> y (..., m)
              '------- A (n, r) --- B (r, m) --- s -----'

    The two thin products are computed as written: neither `W + s A B` nor a gradient of
    the kernel's size is ever formed.

    Args:
        *args: Arguments of `keras.layers.Dense`, beginning with `units`.
        rank: Positive integer r. Defaults to 8.
        alpha: Strength; `None` means `rank`, a scale of 1.
        init: `"loraplus"` (A = 0, B ~ U(-1/sqrt(r), 1/sqrt(r))), `"lora"`
            (A ~ U(-1/sqrt(n), 1/sqrt(n)), B = 0), or a pair of Keras initializers of which
            exactly one is zeros.
        scaling: `"standard"` (s = alpha / r) or `"rslora"` (s = alpha / sqrt(r)).
        dropout: Rate at which the adapter's input is dropped while training.
        max_rank: Rank up to which A and B have room, filled with zeros, for adapters of other
            ranks (`keras_loraplus.add_adapter`); `None` means `rank`.
        **kwargs: Further arguments of `keras.layers.Dense`.

    Input shape:
        `(batch, ..., n)`.

    Output shape:
        `(batch, ..., units)`, in the compute dtype of the layer's policy.

    Variables:
        `kernel` (n, units) frozen; `bias` (units,); `lora_kernel_a` (n, r) and
        `lora_kernel_b` (r, units) float32; `lora_scaling` () frozen.

    Raises:
        ValueError: If a setting is out of range, or the layer has a kernel constraint.

    Example:
        >>> layer = LoRAPlusDense(4, rank=2, alpha=4)
        >>> layer(keras.ops.ones((1, 3))).shape[-1]
        4
        >>> [v.name for v in layer.trainable_variables]
        ['bias', 'lora_kernel_a', 'lora_kernel_b']

    Source: Hu et al., arXiv 2106.09685; Hayou et al., arXiv 2402.12354.
    """

    plain_class = keras.layers.Dense

    def _plan_factors(self, spec):
        fan_in, units = self._matrix_shape("_kernel")
        a_init, b_init = factor_initializers(spec.init, fan_in, spec.rank)
        return [
            Factor("lora_kernel_a", (fan_in, spec.rank), a_init, fan_in, (0, None)),
            Factor("lora_kernel_b", (spec.rank, units), b_init, units, (None, 1)),
        ]

    def _factors(self):
        return (Factors("_kernel", "lora_kernel_a", "lora_kernel_b", ops.matmul),)

    def call(self, inputs, training=None):
        """Returns `activation(x W + s (x A) B + bias)`."""
        outputs = self._adapted_product(inputs, training)  # (..., m)
        return self._activated(outputs)
