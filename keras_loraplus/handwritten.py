"""Finds layers that hold weights themselves, in no `Dense`, and get no adapter unasked."""

from keras_loraplus import _compat
from keras_loraplus.layers import kind_of, lora_class_for
from keras_loraplus.layers.adapter_types import NAMED
from keras_loraplus.layers.adopt import why_without_adapter

# Parts of names of tables: their rows are looked up or added, and no input is multiplied by them.
_TABLES = ("bias", "embed", "pos", "token")


def own_matrices(layer):
    """Returns the matrices by which a layer multiplies its inputs itself.

    Banks of experts, recurrences and some projections are written so: they hold their weights
    as variables of their own instead of in a `Dense`. Tables of embeddings, positions and biases
    do not count, by their names.

    Args:
        layer: A built Keras layer.

    Returns:
        Dict from variable name to shape; empty for types that are adapted unless they are left out.
    """
    if kind_of(type(layer)) not in (None, NAMED):
        return {}
    return {
        variable.name: tuple(variable.shape)
        for variable in _compat.own_variables(layer)
        if sum(size > 1 for size in variable.shape) >= 2
        and not any(part in variable.name for part in _TABLES)
    }


def why_not_adaptable(layer):
    """Returns why a layer that holds matrices itself cannot have an adapter, or None.

    Args:
        layer: A built Keras layer.

    Returns:
        A short text that names the matrices and their shapes, or None.
    """
    if lora_class_for(type(layer)) is not None or not own_matrices(layer):
        return None
    return f"{why_without_adapter(type(layer))}; {_holds(layer)}"


def why_not_asked_for(layer):
    """Returns why a layer whose adapter only targets by name mean has none, or None.

    Args:
        layer: A built Keras layer that no target names.
    """
    if kind_of(type(layer)) != NAMED:
        return None
    return f"{type(layer).__name__} is adapted only where `targets` name it; {_holds(layer)}"


def _holds(layer):
    listed = ", ".join(f"{name} {shape}" for name, shape in own_matrices(layer).items())
    return f"it holds its weights itself: {listed}"
