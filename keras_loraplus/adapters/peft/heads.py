"""Layers of a task that KerasHub's converters do not know: the user names their modules."""

import keras
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.layers import is_adapted


def head_layers(model, modules_to_save):
    """Returns {Hugging Face module: Dense layer} for a user's mapping of names.

    Args:
        model: The model.
        modules_to_save: Dict from Hugging Face module to the name of a `Dense` layer; or None.

    Raises:
        ValueError: If a name is not that of exactly one dense layer without an adapter.
    """
    found = {}
    for module, name in (modules_to_save or {}).items():
        layers = [layer for layer in _compat.flatten_layers(model) if layer.name == name]
        if len(layers) != 1 or not isinstance(layers[0], keras.layers.Dense):
            names = sorted(
                layer.name
                for layer in _compat.flatten_layers(model)
                if isinstance(layer, keras.layers.Dense) and not is_adapted(layer)
            )
            raise ValueError(
                f"modules_to_save: expected the name of one Dense layer of '{model.name}' for "
                f"'{module}'. Received: {name!r}. Dense layers without adapters: {names}."
            )
        if is_adapted(layers[0]):
            raise ValueError(f"modules_to_save: layer '{name}' has an adapter; leave it out.")
        found[module] = layers[0]
    return found


def head_variables(heads):
    """Returns {Hugging Face key: (variable, whether it is transposed)}."""
    found = {}
    for module, layer in heads.items():
        found[f"{module}.weight"] = (layer._kernel, True)
        if layer.bias is not None:
            found[f"{module}.bias"] = (layer.bias, False)
    return found


def head_value(variable, transposed):
    """Returns the Hugging Face tensor of a head's variable."""
    value = ops.convert_to_numpy(ops.cast(variable, "float32"))
    return value.T.copy() if transposed else value
