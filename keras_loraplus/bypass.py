"""Finds layers whose kernel another layer reads directly, past the call that an adapter extends."""

import ast
import functools
import inspect
import textwrap
from typing import Any

import keras

from keras_loraplus import _compat

_KERNELS = {"kernel", "_kernel", "embeddings", "_embeddings"}

# What is read of a kernel in these is not a forward pass.
_NOT_FORWARD = ("build", "get_config", "load", "quantize", "save")

# Facts about a kernel, which say nothing of its values.
_FACTS = {"assign", "dtype", "name", "path", "regularizer", "shape", "trainable"}


def bypassed_layers(layers):
    """Returns the layers whose kernel is read by the layer that holds them.

    A composite layer that computes with `self.inner.kernel` goes past `self.inner.call`, and so
    past an adapter: some blocks of KerasHub do. The source of every composite class is searched
    for it, Keras's own left out.

    Args:
        layers: All layers of a model.

    Returns:
        Dict from `id(layer)` to a short text that says who reads it and how.

    Example:
        >>> class Block(keras.layers.Layer):
        ...     def call(self, inputs):
        ...         return keras.ops.matmul(inputs, self.inner.kernel)
        >>> bypassed_layers([])
        {}
    """
    found = {}
    for parent in layers:
        layer_class: Any = type(parent)
        reads = direct_reads(layer_class)
        if not reads:
            continue
        for name, child in _compat.attributes(parent):
            if name in reads and isinstance(child, keras.layers.Layer):
                found[id(child)] = (
                    f"{type(parent).__name__} reads its kernel directly (`self.{name}.kernel`), "
                    "past the call that an adapter extends"
                )
    return found


@functools.cache
def direct_reads(layer_class):
    """Returns the names of attributes of which methods of a class read the kernel.

    Args:
        layer_class: A class; its bases count too.

    Returns:
        Frozen set of attribute names; empty where there is no source to search.
    """
    names: set = set()
    for base in layer_class.__mro__:
        if base.__module__.split(".")[0] in ("builtins", "keras", "tensorflow", "torch"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and not method.name.lstrip("_").startswith(
                _NOT_FORWARD
            ):
                names |= _reads_in(method)
    return frozenset(names)


def _reads_in(method):
    facts = {
        id(node.value)
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and node.attr in _FACTS
    }
    return {
        node.value.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and node.attr in _KERNELS
        and id(node) not in facts
        and isinstance(node.value, ast.Attribute)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "self"
    }
