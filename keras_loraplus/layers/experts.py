"""Adapters of the banks of experts that KerasHub writes itself (checked on keras-hub 0.32.0).

Each bank keeps the matrices of all its experts in one variable and multiplies every token by all of
them; the block around it weighs the results. Every expert has an A and a B of its own.
"""

import functools
import types

import keras
import numpy as np
from keras import ops

from keras_loraplus.layers.matrix_adapter import MatrixAdapter

_GATE = "_expert_feedforward_gate_dense"
_UP = "_expert_feedforward_intermediate_dense"
_DOWN = "_expert_feedforward_output_dense"
_TO_HIDDEN, _BACK = "th,ehm->etm", "eti,eih->eth"


class ExpertBank(MatrixAdapter):
    """What the adapters of expert banks share.

        hidden[e] = activation(x G[e]) * (x U[e]),    out[e] = hidden[e] D[e]

    with `+ s (x A[e]) B[e]` on every product. A and B of a matrix (experts, n, m) are
    (experts, n, r) and (experts, r, m).
    """

    groups = "e"

    @classmethod
    def why_not_adaptable(cls, layer):
        """Returns why a built bank cannot carry the adapter, or None."""
        if not _computes_alike(*cls.registered_as):
            return (
                f"the installed KerasHub's {cls.registered_as[1].__name__} computes something else "
                "than its adapter, which was written for keras-hub 0.32"
            )
        return super().why_not_adaptable(layer)


class MixtralExpertsAdapter(ExpertBank):
    """Gate and up-projection are matrices of their own; the activation is taken in float32."""

    equations = {_GATE: _TO_HIDDEN, _UP: _TO_HIDDEN, _DOWN: _BACK}

    def call(self, hidden_states, training=None):
        """Returns the outputs of all experts, (experts, tokens, hidden)."""
        gate = ops.cast(self.product(_GATE, hidden_states, training), "float32")
        gate = ops.cast(self.activation(gate), self.compute_dtype)
        up = self.product(_UP, hidden_states, training)
        return self.product(_DOWN, ops.multiply(up, gate), training)


class QwenExpertsAdapter(ExpertBank):
    """The two halves of one matrix are the gate and the up-projection."""

    equations = {_GATE: _TO_HIDDEN, _DOWN: _BACK}

    def call(self, hidden_states, training=None):
        """Returns the outputs of all experts, (experts, tokens, hidden)."""
        gate, up = ops.split(self.product(_GATE, hidden_states, training), 2, axis=-1)
        return self.product(_DOWN, ops.multiply(up, self._activated(gate)), training)

    def _activated(self, gate):
        return self.activation(gate)


class Qwen35ExpertsAdapter(QwenExpertsAdapter):
    """The activation is SiLU, in float32."""

    def _activated(self, gate):
        return ops.cast(ops.silu(ops.cast(gate, "float32")), gate.dtype)


class GptOssExpertsAdapter(ExpertBank):
    """Gate and up-projection alternate, are clipped and have biases."""

    equations = {"gate_up_proj": _TO_HIDDEN, "down_proj": "etm,emh->eth"}

    def call(self, hidden_states, training=None):
        """Returns the outputs of all experts, (experts, tokens, hidden)."""
        both = self.product("gate_up_proj", hidden_states, training)
        both = ops.add(both, ops.expand_dims(self.gate_up_proj_bias, axis=1))
        gate = ops.clip(both[..., 0::2], -1e9, self.limit)
        up = ops.clip(both[..., 1::2], -self.limit, self.limit)
        # With Python's operators, as KerasHub has it: on torch they take `alpha` as it is, where
        # the nightly Keras's `ops.multiply` would first round it to the compute dtype.
        gate = gate * ops.sigmoid(gate * self.alpha)
        outputs = self.product("down_proj", (up + 1) * gate, training)
        return ops.add(outputs, ops.expand_dims(self.down_proj_bias, axis=1))


# By the name of KerasHub's class; `_compat.HUB_EXPERTS` says where it is.
ADAPTERS = {
    "MixtralMoeExperts": MixtralExpertsAdapter,
    "QwenMoeExperts": QwenExpertsAdapter,
    "Qwen3MoeExperts": QwenExpertsAdapter,
    "Qwen3_5MoeExperts": Qwen35ExpertsAdapter,
    "GptOssExperts": GptOssExpertsAdapter,
}


class _Tiny(types.SimpleNamespace):
    """A bank of two experts without Keras around it: what either `call` reads of a layer."""

    def product(self, name, inputs, training=None):
        return ops.einsum(self.equations[name], inputs, getattr(self, name))


@functools.cache
def _computes_alike(adapter, plain_class):
    """Whether KerasHub's `call` is still the one that the adapter repeats, in small numbers.

    A class of another version may read other attributes or gate otherwise; its outputs would then
    change by being adapted.
    """
    rng = np.random.default_rng(0)

    def tensor(*shape):
        return ops.convert_to_tensor(np.asarray(rng.normal(size=shape), "float32"))

    hidden = 3 if _UP in adapter.equations else 6
    values = {_GATE: tensor(2, 4, hidden), _UP: tensor(2, 4, hidden), _DOWN: tensor(2, 3, 4)}
    values |= {"gate_up_proj": tensor(2, 4, 6), "down_proj": tensor(2, 3, 4)}
    values |= {"gate_up_proj_bias": tensor(2, 6), "down_proj_bias": tensor(2, 4)}
    tiny = _Tiny(
        equations=adapter.equations,
        activation=keras.activations.tanh,
        compute_dtype="float32",
        alpha=1.3,
        limit=0.5,
        **values,
    )
    tiny._activated = lambda gate: adapter._activated(tiny, gate)
    inputs = tensor(5, 4)
    try:
        theirs, ours = (ops.convert_to_numpy(c.call(tiny, inputs)) for c in (plain_class, adapter))
    except Exception:  # whatever another version may ask of its layer
        return False
    return theirs.shape == ours.shape and np.allclose(theirs, ours, rtol=1e-4, atol=1e-5)
