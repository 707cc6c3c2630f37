"""Finds the layers that produce a model's outputs: a new head stays trainable and unadapted."""

import keras

from keras_loraplus import _compat
from keras_loraplus.layers import lora_class_for


def output_layers(model):
    """Returns the layers whose weights stand last before the model's outputs.

    From every output the graph is walked back through operations and layers without weights
    (activations, reshapes, sums) to the first layer that has any. A nested model is entered. A
    subclassed model, which has no graph, is called once on symbolic tensors of the shapes that it
    was built with.

    Args:
        model: A built `keras.Model`.

    Returns:
        List of layers, each once.

    Raises:
        ValueError: If a subclassed model cannot be called on symbolic tensors, so that its head
            is not known.
    """
    found: dict = {}
    with _compat.graph_left_untouched(model):
        _collect(model, found)
    return list(found.values())


def _collect(layer, found):
    """Adds the layers that produce the outputs of a composite layer."""
    for tensor in _symbolic_outputs(layer):
        _walk_back(tensor, found, set())


def _walk_back(tensor, found, seen):
    if id(tensor) in seen or not hasattr(tensor, "_keras_history"):
        return
    seen.add(id(tensor))
    operation, inputs = _compat.node_inputs(tensor)
    if not isinstance(operation, keras.layers.Layer) or not operation.weights:
        for earlier in inputs:
            _walk_back(earlier, found, seen)
    elif _is_composite(operation):
        try:
            _collect(operation, found)
        except ValueError:
            if isinstance(operation, keras.Model) or _adaptable_count(operation) > 1:
                raise
            found[id(operation)] = operation
    else:
        found[id(operation)] = operation


def _is_composite(layer):
    return any(inner.weights for inner in _compat.flatten_layers(layer)[1:])


def _adaptable_count(layer):
    return sum(lora_class_for(type(inner)) is not None for inner in _compat.flatten_layers(layer))


def _symbolic_outputs(layer):
    outputs = getattr(layer, "outputs", None)
    if outputs:
        return keras.tree.flatten(outputs)
    shapes = _compat.build_shapes(layer)
    try:
        inputs = {
            name.removesuffix("_shape"): keras.tree.map_shape_structure(keras.KerasTensor, shape)
            for name, shape in shapes.items()
        }
        if len(inputs) == 1:
            outputs = layer.call(*inputs.values())
        else:
            outputs = layer.call(**inputs)
    except Exception as error:  # a user's call may fail on symbolic inputs in any way
        raise ValueError(
            f"Which layers produce the outputs of '{layer.name}' ({type(layer).__name__}) is not "
            f"known: it could not be called on symbolic tensors of the shapes it was built with "
            f"({shapes}): {type(error).__name__}: {error}. Name the layers to adapt: targets=[...] "
            "with layer names or regexes on layer paths, and exclude=[...] for the head."
        ) from error
    return [leaf for leaf in keras.tree.flatten(outputs) if isinstance(leaf, keras.KerasTensor)]
