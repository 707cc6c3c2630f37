"""What `call` of a LoRA+ layer is made of: the frozen product, and the adapter's added to it."""

from typing import TYPE_CHECKING

import keras
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.layers import quantized

if TYPE_CHECKING:
    # The mixin stands in front of a Keras layer and uses its attributes.
    from keras.layers import Layer as _Mixed
else:
    _Mixed = object


class Products(_Mixed):
    """The arithmetic of `x W + s (x A) B`; how A and B come about is `LowRankLayer`'s."""

    def _scaled(self, other, factor):
        """Returns one factor, and s times the other, in the compute dtype.

        The scale is applied in float32, before the cast.
        """
        dtype = self.compute_dtype
        scale = ops.convert_to_tensor(self.lora_scaling)
        scaled = ops.multiply(ops.convert_to_tensor(factor), scale)
        return ops.cast(other, dtype), ops.cast(scaled, dtype)

    def _dropped(self, inputs, training, noise_shape=None):
        """Drops parts of the adapter's input while training."""
        if not self._adapter.dropout:
            return inputs
        if training is None:
            training = self.__dict__.get("_lora_training")
        if training is None:
            training = _compat.training_in_call_context()
        if not training:
            return inputs
        return keras.random.dropout(
            inputs, self._adapter.dropout, noise_shape=noise_shape, seed=self.lora_seed_generator
        )

    def _frozen(self, kernel):
        """Returns the kernel without a gradient of its own.

        TensorFlow's tape watches every variable that was once made trainable, and would compute a
        gradient of the kernel's size for nobody.
        """
        return ops.stop_gradient(kernel)

    def _frozen_product(self, inputs, equation=None, in_order=False):
        """Returns the layer's own product, without bias; `_adapted_product` has the arguments."""
        if self.quantization_mode is not None:
            return quantized.product(self, inputs)
        kernel = self._frozen(self.kernel)
        if in_order:
            return _compat.matmul_of_frozen(inputs, kernel, equation)
        return ops.einsum(equation, inputs, kernel)

    def _adapted_product(self, inputs, training, equation=None, in_order=True):
        """Returns `inputs W + s (inputs A) B + bias`, of an equation that is a product of matrices.

        Args:
            inputs: The layer's inputs.
            training: Whether the adapter's inputs are dropped.
            equation: The layer's einsum equation, or None for a product of matrices.
            in_order: Whether the kernel's axes are those that are contracted and then the others.
        """
        adapter_inputs = self._dropped(inputs, training)
        a, b = self.lora_kernel_a, self.lora_kernel_b
        if in_order and adapter_inputs is inputs and self.quantization_mode is None:
            outputs = _compat.adapted_product(
                equation, inputs, self.kernel, self.bias, a, b, self.lora_scaling
            )
            if outputs is not None:
                return outputs
        a, b = self._scaled(a, b)
        if equation is not None:
            a, b = ops.reshape(a, (-1, a.shape[-1])), ops.reshape(b, (b.shape[0], -1))
        outputs = self._frozen_product(inputs, equation, in_order)
        return self._plus_bias(self._plus_product(outputs, adapter_inputs, a, b))

    def _plus_bias(self, outputs):
        return outputs if self.bias is None else ops.add(outputs, self.bias)

    def _activated(self, outputs):
        if self.activation is None:
            return outputs
        return _compat.activated(self.activation, outputs)

    def _plus_product(self, outputs, inputs, a, b):
        """Returns `outputs + (inputs A) B` for matrices A (n, r) and B (r, m).

        The products are those of matrices: with more axes XLA moves the inputs in memory for each
        gradient.
        """
        flat = ops.reshape(inputs, (-1, a.shape[0]))
        inner = _compat.thin_product(flat, a)  # (tokens, r)
        return _compat.add_product(outputs, inner, b)
