"""Lets KerasHub's converters name matrices that are packed, and no variables of their own shape."""

import contextlib
import dataclasses
import weakref

from keras_loraplus import _compat
from keras_loraplus.layers import quantized


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Stands in for the variable that a matrix would be in, were it not packed."""

    name: str
    path: str
    shape: tuple


_STAND_INS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def matrix_variable(layer, name):
    """Returns the variable of a frozen matrix, or for a packed one always the same stand-in.

    Args:
        layer: A built layer.
        name: Attribute of the matrix in the layer that is not quantized.
    """
    if layer.quantization_mode in (None, "int8", "float8"):
        return getattr(layer, name)
    known = _STAND_INS.setdefault(layer, {})
    if name not in known:
        plain = name.lstrip("_")
        shape = quantized.matrix_shape(layer, name)
        known[name] = Packed(plain, f"{layer.path or layer.name}/{plain}", shape)
    return known[name]


@contextlib.contextmanager
def presented(root):
    """Makes packed layers below `root` show their stand-ins where converters look for variables."""
    changed = []
    for layer in _compat.flatten_layers(root):
        if layer.quantization_mode in (None, "int8", "float8") or not layer.built:
            continue
        shown: dict = {}
        for public, name in (("kernel", "_kernel"), ("embeddings", "_embeddings")):
            if hasattr(type(layer), public):
                # What stands in the class is what reading the attribute gives.
                shown[public] = matrix_variable(layer, name)
        changed.append((layer, type(layer)))
        layer.__class__ = type(type(layer).__name__, (type(layer),), shown)
    try:
        yield
    finally:
        for layer, own in changed:
            layer.__class__ = own
