"""Finds layers that a functional model keeps and never calls."""

from keras_loraplus import _compat


def uncalled_layers(model, scope):
    """Returns the layers of `scope` that no graph calls.

    A composite may keep layers that it does not use: an encoder whose first convolution it
    replaces, a squeeze-and-excite block at a ratio of zero, a decoder that only a task calls. An
    adapter on one of them would train nothing.

    Args:
        model: The user's model, whose graph counts too.
        scope: The part of it whose layers are looked at.

    Returns:
        Dict from `id(layer)` to a short text; empty unless both are functional and leave `call` as
        it is, because nothing else says what it calls.
    """
    if not (_compat.runs_its_graph(model) and _compat.runs_its_graph(scope)):
        return {}
    called: set = set()
    _collect(model, called)
    _collect(scope, called)
    return {
        id(layer): f"the graph of '{scope.name}' does not call it, so that the outputs do not "
        "depend on it"
        for layer in _compat.flatten_layers(scope)
        if id(layer) not in called
    }


def _collect(functional, called):
    """Adds the layers that the operations of a functional model are or hold."""
    called.add(id(functional))
    for operation in functional.operations:
        if id(operation) in called or not hasattr(operation, "weights"):
            continue
        if _compat.runs_its_graph(operation):
            _collect(operation, called)
        else:
            called.update(id(layer) for layer in _compat.flatten_layers(operation))
