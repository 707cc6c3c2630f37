"""Learns from KerasHub's own converters which Hugging Face tensor each variable comes from."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_loraplus import _compat
from keras_loraplus.adapters.peft.packed import presented


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a variable's value comes from.

    Attributes:
        variable: The Keras variable.
        key: Key of the Hugging Face tensor, as in the checkpoint.
        shape: Shape of that tensor.
        index: Integers of the variable's shape, the position of each entry in the flattened
            tensor; None unless asked for.
        fault: Why there is no such index, or None.
    """

    variable: Any
    key: str
    shape: tuple
    index: Any = None
    fault: str | None = None


def record(backbone, checkpoint, wanted=()):
    """Runs the backbone's converter without any weights and notes what it would port.

    A converter ports a tensor through a hook that puts it into Keras's layout. Passing each hook
    the positions of the tensor's entries, in place of the entries, shows what it does.

    Args:
        backbone: A KerasHub backbone; nothing of it changes.
        checkpoint: The `Checkpoint`.
        wanted: Variables whose index is wanted. Hooks run while the converter does, since they may
            refer to variables of its loops.

    Returns:
        Dict from the id of a variable to its `Source`.

    Raises:
        ValueError: If KerasHub has no converter for the checkpoint, or it is one of another
            architecture than the backbone's.
    """
    converter = _compat.hub_converter(checkpoint.config)
    if not isinstance(backbone, converter.backbone_cls):
        raise ValueError(
            f"The checkpoint is of model type {checkpoint.config.get('model_type')!r}, for "
            f"{converter.backbone_cls.__name__}. Received: a {type(backbone).__name__}. Pass the "
            "checkpoint that the backbone was loaded from."
        )
    recorder = _Recorder(checkpoint.shapes, {id(variable) for variable in wanted})
    try:
        # Some converters assign to variables themselves; in this scope that changes nothing.
        with keras.StatelessScope(), presented(backbone):
            converter.convert_weights(backbone, recorder, checkpoint.config)
    except Exception as error:  # a converter fails on a checkpoint of other sizes in any way
        raise ValueError(
            f"KerasHub's converter for {checkpoint.config.get('model_type')!r} does not fit the "
            f"checkpoint and the backbone '{backbone.name}': {type(error).__name__}: {error}"
        ) from error
    return recorder.sources


class _Recorder:
    """Stands in for KerasHub's `SafetensorLoader` (0.32.0), from the outside."""

    def __init__(self, shapes, wanted):
        self.shapes, self.wanted = shapes, wanted
        self.sources: dict = {}

    def full_key(self, key):
        if key in self.shapes:
            return key
        longer = [full for full in self.shapes if full.endswith("." + key)]
        if not longer:
            raise KeyError(f"The checkpoint has no tensor '{key}'.")
        return min(longer, key=len)

    def get_prefixed_key(self, key, keys):
        del keys
        return self.full_key(key)

    def get_tensor(self, key):
        # A converter that assigns by itself may compute with it; nothing is learned from that.
        return np.broadcast_to(np.float32(0), self.shapes[self.full_key(key)])

    def port_weight(self, keras_variable, hf_weight_key, hook_fn=None):
        key = self.full_key(hf_weight_key)
        shape = self.shapes[key]
        index = fault = None
        if id(keras_variable) in self.wanted:
            index, fault = _learned(_positions(shape), hook_fn, tuple(keras_variable.shape))
        source = Source(keras_variable, key, shape, index, fault)
        self.sources[id(keras_variable)] = source


class _Positions(np.ndarray):
    """Positions of a tensor's entries, which can be moved and not computed with."""

    def astype(self, *args, **kwargs):
        # Where a hook rounds values (Mistral's, to float16), each entry stays where it is.
        del args, kwargs
        return self

    def __array_ufunc__(self, ufunc, *args, **kwargs):
        raise TypeError(f"it computes {ufunc.__name__}")


def _positions(shape):
    count = int(np.prod(shape, dtype="int64"))
    return np.arange(count, dtype="int64").reshape(shape).view(_Positions)


def _learned(positions, hook, shape):
    try:
        moved = hook(positions, list(shape)) if hook else positions
        index = np.array(moved, subok=False)
    except Exception as error:  # a hook is KerasHub's code, and may do anything to its tensor
        return None, f"KerasHub's conversion of it does more than permute and reshape ({error})"
    if index.shape != shape:
        return None, f"it has shape {index.shape} in the checkpoint and {shape} in the model"
    whole = np.issubdtype(index.dtype, np.integer)
    if not whole or index.min() < 0 or index.max() >= positions.size:
        return None, "KerasHub computes with it, beyond permuting and reshaping"
    if np.unique(index).size != index.size:
        return None, "KerasHub repeats entries of it"
    return index, None
