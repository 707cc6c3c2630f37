"""`keras.layers.Embedding` and `ReversibleEmbedding` with a low-rank adapter."""

import keras
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.layers import quantized
from keras_loraplus.layers.base import LowRankLayer
from keras_loraplus.layers.factors import Factor, Factors
from keras_loraplus.layers.initial import embedding_initializers, factor_initializers


@keras.saving.register_keras_serializable("keras_loraplus")
class LoRAPlusEmbedding(LowRankLayer, keras.layers.Embedding):
    """An embedding that trains two thin matrices beside a frozen table.

        y[t] = E[t] + s A[t] B,    s = alpha / rank

    Rows of A (r wide) are gathered and multiplied by B; the (vocabulary, dim) product A B is
    never formed.

    Args:
        *args: Arguments of `keras.layers.Embedding`: `input_dim`, `output_dim`.
        rank: Positive integer r. Defaults to 8.
        alpha: Strength; `None` means `rank`, a scale of 1.
        init: `"loraplus"` (A = 0, B ~ U(-1/sqrt(r), 1/sqrt(r))), `"lora"` (A = 0, B ~ N(0, 1), as
            PEFT), or a pair of Keras initializers of which exactly one is zeros.
        scaling: `"standard"` (s = alpha / r) or `"rslora"` (s = alpha / sqrt(r)).
        dropout: Rate at which the adapter's input, a one-hot row per token, is dropped while
            training: the whole token loses its `s A[t] B`.
        max_rank: Rank up to which A and B have room, filled with zeros, for adapters of other
            ranks (`keras_loraplus.add_adapter`); `None` means `rank`.
        **kwargs: Further arguments of `keras.layers.Embedding`.

    Input shape:
        Integers, `(batch, ...)`.

    Output shape:
        `(batch, ..., output_dim)`, in the compute dtype of the layer's policy.

    Variables:
        `embeddings` (input_dim, output_dim) frozen; `lora_embeddings_a` (input_dim, r) and
        `lora_embeddings_b` (r, output_dim) float32; `lora_scaling` () frozen.

    Raises:
        ValueError: If a setting is out of range, or the layer has a constraint.

    Example:
        >>> layer = LoRAPlusEmbedding(10, 4, rank=2)
        >>> layer(keras.ops.array([[1, 2, 3]])).shape[-1]
        4
        >>> [v.name for v in layer.trainable_variables]
        ['lora_embeddings_a', 'lora_embeddings_b']

    Source: Hu et al., arXiv 2106.09685; arXiv 2402.12354; PEFT's embedding initialisation.
    """

    plain_class = keras.layers.Embedding

    @classmethod
    def matrix_attributes(cls):
        """Returns the attributes through which the layer gives its table."""
        return ("embeddings",)

    def __init__(self, *args, weights=None, **kwargs):
        """Takes the arguments of the Keras layer, and those of the adapter by name."""
        super().__init__(*args, **kwargs)
        if weights is None:
            return
        # Keras would set all variables of the layer; the values are those of the tables alone.
        self.build()
        values = weights if isinstance(weights, list) else [weights]
        for table, value in zip(self._kernels(), values, strict=True):
            table.assign(value)

    def _plan_factors(self, spec):
        vocabulary, dim = self.input_dim, self.output_dim
        a_init, b_init = embedding_initializers(spec.init, spec.rank)
        a_shape, b_shape = (vocabulary, spec.rank), (spec.rank, dim)
        a_axes, b_axes, table = (0, None), (None, 1), "_embeddings"
        return [
            Factor("lora_embeddings_a", a_shape, a_init, vocabulary, a_axes, table),
            Factor("lora_embeddings_b", b_shape, b_init, dim, b_axes, table),
        ]

    def _factors(self):
        return (Factors("_embeddings", "lora_embeddings_a", "lora_embeddings_b", ops.matmul),)

    @classmethod
    def why_not_adaptable(cls, layer):
        """Returns why a built `Embedding` cannot carry the adapter, or None."""
        if getattr(layer, "embeddings_constraint", None) is not None:
            return "its embeddings_constraint would hold for E alone, not for E + s A B"
        return super().why_not_adaptable(layer)

    def compute_output_spec(self, inputs, training=None):
        """Returns the symbolic output; Keras's own takes no `training`."""
        return super().compute_output_spec(inputs)

    def call(self, inputs, training=None):
        """Returns `E[t] + s A[t] B` for every token t."""
        if keras.backend.standardize_dtype(inputs.dtype) not in ("int32", "int64"):
            inputs = ops.cast(inputs, "int32")
        # s is on A: what a gather reads directly gets a sparse gradient on TensorFlow, of which
        # Keras squares repeated rows one by one (3.15.1), so that Adam's second moment is wrong.
        b, a = self._scaled(self.lora_embeddings_b, self.lora_embeddings_a)
        rows = self._frozen_rows(inputs)
        inner = ops.take(a, inputs, axis=0)  # (..., r)
        if self.adapter.dropout:
            one_draw_per_token = (None,) * (len(inner.shape) - 1) + (1,)
            inner = self._dropped(inner, training, noise_shape=one_draw_per_token)
        return ops.add(rows, ops.matmul(inner, b))

    def _frozen_rows(self, tokens):
        if self.quantization_mode is None:
            taken = ops.take(self._frozen(self.embeddings), tokens, axis=0)
            return ops.cast(taken, self.compute_dtype)
        return quantized.rows(self, tokens)


@keras.saving.register_keras_serializable("keras_loraplus")
class LoRAPlusReversibleEmbedding(LoRAPlusEmbedding, keras.layers.ReversibleEmbedding):
    """A reversible embedding that trains thin matrices beside its frozen tables.

        forward:           y[t]   = E[t] + s A[t] B
        reverse, tied:     logits = x E^T + s (x B^T) A^T
        reverse, untied:   logits = x R   + s (x C) D

    Tied weights share one adapter in both directions. Untied weights have one each: A and B on
    the table E (`lora_embeddings_a`, `lora_embeddings_b`), C and D on the output projection R
    (`lora_kernel_a`, `lora_kernel_b`), initialised as those of a dense layer.

    Args:
        *args: Arguments of `keras.layers.ReversibleEmbedding`: `input_dim`, `output_dim`,
            `tie_weights`.
        rank: Positive integer r. Defaults to 8.
        alpha: Strength; `None` means `rank`, a scale of 1.
        init: As for `LoRAPlusEmbedding`.
        scaling: `"standard"` or `"rslora"`.
        dropout: Rate at which the adapter's input is dropped while training; in reverse it is an
            ordinary dropout of x.
        max_rank: Rank up to which A and B have room, filled with zeros, for adapters of other
            ranks (`keras_loraplus.add_adapter`); `None` means `rank`.
        **kwargs: Further arguments of `keras.layers.ReversibleEmbedding`.

    Input shape:
        Forward: integers, `(batch, ...)`. Reverse: `(batch, ..., output_dim)`.

    Output shape:
        Forward: `(batch, ..., output_dim)`. Reverse: `(batch, ..., input_dim)`.

    Raises:
        ValueError: If a setting is out of range, or the layer has a constraint.

    Example:
        >>> layer = LoRAPlusReversibleEmbedding(10, 4, rank=2)
        >>> hidden = layer(keras.ops.array([[1, 2, 3]]))
        >>> layer(hidden, reverse=True).shape[-1]
        10

    Source: Press and Wolf, arXiv 1608.05859; Hu et al., arXiv 2106.09685; arXiv 2402.12354.
    """

    plain_class = keras.layers.ReversibleEmbedding

    def _plan_factors(self, spec):
        factors = super()._plan_factors(spec)
        if self.tie_weights:
            return factors
        vocabulary, dim = self.input_dim, self.output_dim
        a_init, b_init = factor_initializers(spec.init, dim, spec.rank)
        a_shape, b_shape = (dim, spec.rank), (spec.rank, vocabulary)
        a_axes, b_axes, table = (0, None), (None, 1), "reverse_embeddings"
        return [
            *factors,
            Factor("lora_kernel_a", a_shape, a_init, dim, a_axes, table),
            Factor("lora_kernel_b", b_shape, b_init, vocabulary, b_axes, table),
        ]

    def _factors(self):
        pairs = super()._factors()
        if self.tie_weights:
            return pairs
        reverse = Factors("reverse_embeddings", "lora_kernel_a", "lora_kernel_b", ops.matmul)
        return (*pairs, reverse)

    def compute_output_spec(self, inputs, reverse=False, training=None):  # type: ignore[override]
        """Returns the symbolic output; Keras's own takes no `training`."""
        return keras.layers.ReversibleEmbedding.compute_output_spec(self, inputs, reverse=reverse)

    def call(self, inputs, reverse=False, training=None):  # type: ignore[override]
        """Returns embeddings, or logits if `reverse`."""
        if not reverse:
            outputs = super().call(inputs, training=training)
            # `ReversibleEmbedding.compute_mask` returns None on purpose: it must not mask
            # logits. The forward mask is set here, as Keras does.
            if self.mask_zero:
                _compat.set_mask(outputs, ops.not_equal(inputs, 0))
            return outputs
        return self._reverse(inputs, training)

    def _reverse(self, inputs, training):
        return quantized.soft_capped(self._logits(inputs, training), self.logit_soft_cap)

    def _logits(self, inputs, training):
        is_quantized = self.quantization_mode is not None
        # Keras's quantized tables know no `reverse_dtype`.
        dtype = None if is_quantized else self.reverse_dtype
        if dtype is not None:
            inputs = ops.cast(inputs, dtype)
        adapter_inputs = self._dropped(inputs, training)
        if self.tie_weights:
            down, up = map(ops.transpose, (self.lora_embeddings_b, self.lora_embeddings_a))
        else:
            down, up = self.lora_kernel_a, self.lora_kernel_b
        if adapter_inputs is inputs and dtype is None and not is_quantized:
            logits = _compat.adapted_product(
                None,
                inputs,
                self._reverse_kernel(),
                None,
                down,
                up,
                self.lora_scaling,
                is_transposed=self.tie_weights,
            )
            if logits is not None:
                return logits
        down, up = self._scaled(down, up)
        if dtype is not None:
            down, up = ops.cast(down, dtype), ops.cast(up, dtype)
        return self._plus_product(self._frozen_logits(inputs), adapter_inputs, down, up)

    def _frozen_logits(self, inputs):
        if self.quantization_mode is not None:
            return quantized.logits(self, inputs)
        kernel = self._reverse_kernel()
        if self.reverse_dtype is not None:
            kernel = ops.cast(kernel, self.reverse_dtype)
        kernel = self._frozen(kernel)
        if self.tie_weights:
            return _compat.logits_of_frozen(inputs, kernel)
        return _compat.matmul_of_frozen(inputs, kernel)

    def _reverse_kernel(self):
        return self.embeddings if self.tie_weights else self.reverse_embeddings
