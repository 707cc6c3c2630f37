"""Finds layers that hold weights themselves and are of no type that adapters exist for."""

from keras_loraplus import _compat
from keras_loraplus.layers import lora_class_for

# Parts of names of tables: their rows are looked up or added, and no input is multiplied by them.
_TABLES = ("bias", "embed", "pos", "token")


def own_matrices(layer):
    """Returns the matrices by which a layer of an unknown type multiplies its inputs itself.

    Banks of experts, recurrences and some projections are written so: they hold their weights
    as variables of their own instead of in a `Dense`. Tables of embeddings, positions and biases
    do not count, by their names.

    Args:
        layer: A built Keras layer.

    Returns:
        Dict from variable name to shape; empty for types that adapters exist for.
    """
    if lora_class_for(type(layer)) is not None:
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
    matrices = own_matrices(layer)
    if not matrices:
        return None
    listed = ", ".join(f"{name} {shape}" for name, shape in matrices.items())
    return (
        f"{type(layer).__name__} is not a layer type that adapters exist for; it holds its weights "
        f"itself: {listed}"
    )
