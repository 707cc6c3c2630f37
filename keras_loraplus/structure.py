"""Names layers and variables by where they stand in a model, not by what they are called.

Variable paths hold auto-numbered names and are not unique: a dual encoder of two equal backbones
shares most of them. A structural path is the way from the root: positions in a functional or
sequential model (`layers.3`), attributes elsewhere (`encoder`, `blocks.0`).
"""

import keras

from keras_loraplus import _compat


def layers_by_path(root):
    """Returns every layer below `root` by its structural path, the root under `""`.

    A layer that stands in several places has the path of the first.

    Args:
        root: A Keras layer or model.

    Returns:
        Dict from path to layer, parents before children.

    Raises:
        ValueError: If two layers have the same path.

    Example:
        >>> inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
        >>> list(layers_by_path(keras.Sequential([keras.Input((2,)), inner])))
        ['', 'layers.0', 'layers.0/layers.0']
    """
    found: dict = {}
    _walk(root, "", found, set())
    return found


def variables_by_path(root, chosen):
    """Returns the chosen variables below `root` by structural path.

    Args:
        root: A Keras layer or model.
        chosen: Function of a variable, whether it is wanted.

    Returns:
        Dict from path to variable.

    Raises:
        ValueError: If two variables of one layer have the same name, so that they cannot be told
            apart in a file.
    """
    found = {}
    for path, layer in layers_by_path(root).items():
        for variable in _compat.own_variables(layer):
            if not chosen(variable):
                continue
            key = f"{path}/{variable.name}" if path else variable.name
            if key in found:
                raise ValueError(
                    f"Layer '{layer.name}' ({path or 'the model itself'}) has two variables named "
                    f"'{variable.name}', which a file could not tell apart. Give the weights of "
                    f"{type(layer).__name__} different names."
                )
            found[key] = variable
    return found


def check_all_reached(root, chosen, found):
    """Raises if a chosen weight stands where no path leads, in a set for example.

    Args:
        root: A Keras layer or model.
        chosen: Function of a variable, whether it is wanted.
        found: The variables that were found.

    Raises:
        ValueError: If a weight is missing.
    """
    reached = {id(variable) for variable in found}
    lost = [v.path for v in root.weights if chosen(v) and id(v) not in reached]
    if lost:
        raise ValueError(
            f"Weights of '{root.name}' that no path of attributes, lists and dicts leads to, so "
            f"that a file could not name them: {lost}. Hold their layers in attributes, lists or "
            "dicts of the model."
        )


def _walk(layer, path, found, seen):
    if path in found:
        raise ValueError(
            f"Two layers stand at '{path}' of the model, which a file could not tell apart: "
            f"'{found[path].name}' and '{layer.name}'. Rename a key of the dict that holds one."
        )
    seen.add(id(layer))
    found[path] = layer
    for name, child in _children(layer):
        if id(child) not in seen:
            _walk(child, f"{path}/{name}" if path else name, found, seen)


def _children(layer):
    if isinstance(layer, keras.Sequential) or _compat.is_functional(layer):
        for position, child in enumerate(layer.layers):
            yield f"layers.{position}", child
    for name, value in _compat.attributes(layer):
        yield from _layers_in(value, name, set())


def _layers_in(value, name, inside):
    """Yields the layers of an attribute by name, through lists, tuples and dicts in one another."""
    if isinstance(value, keras.layers.Layer):
        yield name, value
        return
    if not isinstance(value, (list, tuple, dict)) or id(value) in inside:
        return
    members = value.items() if isinstance(value, dict) else enumerate(value)
    for key, member in members:
        yield from _layers_in(member, f"{name}.{key}", inside | {id(value)})
