"""The matrices of a backbone that can have adapters, and their Hugging Face modules."""

import dataclasses
import re
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.adapters.peft.mapping import layout_of
from keras_loraplus.adapters.peft.packed import matrix_variable
from keras_loraplus.adapters.peft.recording import record
from keras_loraplus.layers.einsum_split import kernel_axes, split_einsum
from keras_loraplus.planning import CONVOLUTIONS, layer_path


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix of a layer beside which an adapter stands or may stand.

    Attributes:
        layer: The layer.
        variable: The matrix.
        a: Name of A among the layer's adapter variables.
        b: Name of B.
        contracted: Axes of the matrix that the input contracts; None where no two thin matrices
            over inputs and outputs exist on the other side.
        free: The other axes.
        is_embedding: Whether its rows are looked up.
    """

    layer: Any
    variable: Any
    a: str
    b: str
    contracted: tuple | None
    free: tuple
    is_embedding: bool

    @property
    def name(self):
        """The matrix's path."""
        return f"{layer_path(self.layer)}/{self.variable.name}"

    def shapes(self, rank):
        """Returns the shapes of A and B."""
        shape = tuple(self.variable.shape)
        assert self.contracted is not None
        return (
            (*(shape[axis] for axis in self.contracted), rank),
            (rank, *(shape[axis] for axis in self.free)),
        )


def matrices_of(root):
    """Returns the `Matrix` of everything below a layer that an adapter may stand beside."""
    found: dict = {}
    for layer in _compat.flatten_layers(root):
        for matrix in _of_layer(layer):
            found.setdefault(id(matrix.variable), matrix)
    return list(found.values())


def why_not_of_logits(model, matrix):
    """Returns why a tied embedding of a language model cannot have an adapter there, or None."""
    tied = matrix.is_embedding and getattr(matrix.layer, "tie_weights", False)
    if not tied or not _compat.hub_ties_logits(model):
        return None
    return (
        f"{matrix.name}: its adapter acts in the logits too, which PEFT's does not; take the "
        "backbone alone, or leave the embedding out"
    )


def _of_layer(layer):
    kernel = ("lora_kernel_a", "lora_kernel_b")
    table = ("lora_embeddings_a", "lora_embeddings_b")
    if not layer.built:
        return
    if isinstance(layer, keras.layers.EinsumDense):
        contracted, free = _einsum_axes(layer.equation)
        yield Matrix(layer, matrix_variable(layer, "_kernel"), *kernel, contracted, free, False)
    elif isinstance(layer, keras.layers.Dense):
        yield Matrix(layer, matrix_variable(layer, "_kernel"), *kernel, (0,), (1,), False)
    elif isinstance(layer, CONVOLUTIONS):
        *contracted, free = range(len(layer._kernel.shape))
        whole = tuple(contracted) if layer.groups == 1 else None
        yield Matrix(layer, layer._kernel, *kernel, whole, (free,), False)
    elif isinstance(layer, keras.layers.Embedding):
        yield Matrix(layer, matrix_variable(layer, "_embeddings"), *table, (0,), (1,), True)
        if isinstance(layer, keras.layers.ReversibleEmbedding) and not layer.tie_weights:
            yield Matrix(
                layer, matrix_variable(layer, "reverse_embeddings"), *kernel, (0,), (1,), False
            )


def _einsum_axes(equation):
    try:
        split = split_einsum(equation)
    except ValueError:
        return None, ()
    if split.shared:
        return None, ()
    axes = kernel_axes(equation)
    return tuple(map(axes.index, split.contracted)), tuple(map(axes.index, split.free))


class ModuleMap:
    """Which Hugging Face module each matrix and each other variable of a backbone belongs to."""

    def __init__(self, backbone, checkpoint):
        """Runs the converter without learning any layout yet."""
        self.backbone, self.checkpoint = backbone, checkpoint
        self.sources = record(backbone, checkpoint)
        self.matrices = matrices_of(backbone)
        self.prefix = _base_prefix(source.key for source in self.sources.values())
        self.renames = _compat.transformers_renames(checkpoint.config.get("model_type"))

    def learn(self, variables):
        """Learns the layouts of variables, and of all that come from the same tensors."""
        keys = {self.sources[id(v)].key for v in variables if id(v) in self.sources}
        wanted = [source.variable for source in self.sources.values() if source.key in keys]
        self.sources = record(self.backbone, self.checkpoint, wanted)

    def module_of(self, variable):
        """Returns the checkpoint's name of the module that a variable belongs to, or None."""
        source = self.sources.get(id(variable))
        return None if source is None else source.key.rpartition(".")[0]

    def relative(self, name):
        """Returns a checkpoint's name without what stands before the base model's own names."""
        return name.removeprefix(self.prefix)

    def renamed(self, name):
        """Returns the name that the installed transformers gives what the checkpoint names."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def matrices_in(self, module):
        """Returns the matrices that come from the weight of a module."""
        return [matrix for matrix in self.matrices if self.module_of(matrix.variable) == module]

    def layout(self, matrix):
        """Returns the `Layout` of a matrix whose variable was learned.

        Raises:
            ValueError: If it has none, with the reason.
        """
        source = self.sources.get(id(matrix.variable))
        if source is None:
            raise ValueError(f"{matrix.name}: KerasHub's converter names no tensor for it")
        reason = source.fault
        if matrix.contracted is None:
            reason = "its kernel is split by expert, head or group, which no LoRA module there is"
        if reason is None:
            reason = self._overlap(source)
        if reason is None:
            try:
                return layout_of(source.index, matrix.contracted, matrix.free, source.shape)
            except ValueError as error:
                reason = str(error)
        raise ValueError(f"{matrix.name} (Hugging Face '{source.key}'): {reason}")

    def _overlap(self, source):
        for other in self.sources.values():
            if other is source or other.key != source.key or other.index is None:
                continue
            if np.intersect1d(other.index, source.index).size:
                return f"it is shared with '{other.variable.path}'"
        return None

    def tensor(self, key):
        """Returns a Hugging Face tensor put together from the variables that come from it.

        Raises:
            ValueError: If they do not make up all of it.
        """
        sources = [source for source in self.sources.values() if source.key == key]
        shape = self.checkpoint.shapes[key]
        value = np.full(int(np.prod(shape)), np.nan, "float32")
        for source in sources:
            if source.index is None:
                raise ValueError(f"'{key}': {source.fault}")
            own = ops.convert_to_numpy(ops.cast(source.variable, "float32"))
            value[source.index.reshape(-1)] = own.reshape(-1)
        covered = sum(source.index.size for source in sources)
        if covered != value.size:
            raise ValueError(f"'{key}': only a part of it is in the model")
        return value.reshape(shape)


def _base_prefix(keys):
    """Returns the first component of all keys but an output layer's, or nothing."""
    first = {key.partition(".")[0] for key in keys if not key.startswith("lm_head.")}
    return f"{first.pop()}." if len(first) == 1 else ""
