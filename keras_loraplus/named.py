"""Several named adapters on one model: one is active and trains, the others wait.

The variables of a model hold the active adapter. Switching copies values in and out of them, so
that nothing is built, compiled or traced again. What belongs to an adapter is A, B and everything
else that trains (a head, say), and the optimizer's state for them.
"""

import weakref

import keras
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.layers import AdapterSpec
from keras_loraplus.registry import (
    Waiting,
    adapted_layers,
    check_name,
    check_room,
    names_of,
    registry_of,
    wait,
    what_trains,
)


def add_adapter(model, name, rank=None, alpha=None, *, init=None, scaling=None, rank_pattern=None):
    """Adds a named adapter, at its initial values, beside those that a model has.

    The model's outputs do not change: the active adapter stays active. The new one is of the same
    layers, A and B at their initial values. What else trains (a head, norms) starts from its values
    of now, so add adapters before training to have a fresh head for each.

    Args:
        model: A model enabled with `enable_lora_plus(model, max_rank=...)`. Where it is compiled,
            or a part of one that is, the model that is compiled.
        name: Name of the new adapter. The first one of a model is `"default"`.
        rank: Positive integer of at most `max_rank`; `None` means that of the active adapter,
            layer by layer.
        alpha: Strength; `None` means the rank.
        init: `"loraplus"`, `"lora"`, a pair of Keras initializers, or `None` for that of the active
            adapter.
        scaling: `"standard"`, `"rslora"`, or `None` for that of the active adapter.
        rank_pattern: Dict from structural layer path (see `list_adapters`) to that layer's rank.

    Raises:
        ValueError: If the name is taken, the rank has no room, or the model has no `max_rank`;
            nothing is changed.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(8), dense(2)])
        >>> report = klp.enable_lora_plus(model, rank=2, max_rank=4)
        >>> klp.add_adapter(model, "large", rank=4)
        >>> klp.set_adapter(model, "large")
        >>> klp.active_adapter(model)
        'large'

    Source: PEFT's methods of the same names.
    """
    adapted = adapted_layers(model)
    registry = registry_of(model, adapted)
    check_room(model, name, {path: layer.adapter for path, layer in adapted.items()})
    if name in names_of(registry):
        raise ValueError(
            f"The model '{model.name}' already has an adapter named '{name}'. Its adapters: "
            f"{names_of(registry)}. Choose another name, or delete that one: `delete_adapter`."
        )
    patterns = dict(rank_pattern or {})
    unknown = sorted(set(patterns) - set(adapted))
    if unknown:
        raise ValueError(
            f"`rank_pattern` names layers without an adapter: {unknown}. Adapted layers: "
            f"{list(adapted)}."
        )
    specs = {
        path: _spec(layer.adapter, patterns.get(path, rank), alpha, init, scaling)
        for path, layer in adapted.items()
    }
    wait(registry, adapted, name, specs)


def set_adapter(model, name):
    """Makes a named adapter the active one.

    Its A, B and other trained values take the place of the active ones, which wait; so does the
    optimizer's state (moments, iterations), which starts anew for an adapter that has not trained.
    The learning rate stays. Functions that were traced before are right, without a new trace.
    Switch between calls of `fit` or at the end of an epoch: within one, JAX holds the values.

    Args:
        model: The model that the adapters were added to.
        name: Name of one of its adapters.

    Raises:
        ValueError: If there is no such adapter, or adapters are disabled; nothing is changed.

    Example:
        See `add_adapter`.
    """
    adapted = adapted_layers(model)
    registry = registry_of(model, adapted)
    check_name(model, registry, name)
    if name == registry.active:
        return
    _check_enabled(adapted)
    optimizer = getattr(model, "optimizer", None)
    state = _state_of(optimizer)
    incoming = registry.waiting[name]
    slots = _slots_for(incoming, optimizer, state)
    outgoing = Waiting(
        specs={path: layer.adapter for path, layer in adapted.items()},
        values=[(variable, ops.copy(variable)) for variable in _owned(model, adapted, incoming)],
        slots=None if state is None else [ops.copy(variable) for variable in state],
        optimizer=None if state is None else weakref.ref(optimizer),
    )
    for variable, value in incoming.values:
        variable.assign(value)
    for path, layer in adapted.items():
        layer.take_spec(incoming.specs[path])
    for variable, value in zip(state or (), slots or (), strict=True):
        variable.assign(value)
    del registry.waiting[name]
    registry.waiting[registry.active] = outgoing
    registry.active = name


def delete_adapter(model, name):
    """Deletes a named adapter that is not active.

    Args:
        model: The model that the adapters were added to.
        name: Name of one of its adapters.

    Raises:
        ValueError: If there is no such adapter, or it is the active one.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(8), dense(2)])
        >>> report = klp.enable_lora_plus(model, rank=2, max_rank=4)
        >>> klp.add_adapter(model, "other")
        >>> klp.delete_adapter(model, "other")
        >>> list(klp.list_adapters(model))
        ['default']
    """
    registry = registry_of(model, adapted_layers(model))
    check_name(model, registry, name)
    if name == registry.active:
        raise ValueError(
            f"The adapter '{name}' is active and cannot be deleted. Switch to another first: "
            f"`set_adapter(model, ...)` with one of {sorted(registry.waiting)}, or merge."
        )
    del registry.waiting[name]


def list_adapters(model):
    """Returns the settings of every adapter of a model, by name and layer.

    Args:
        model: A model with adapters.

    Returns:
        Dict from name to a dict from structural layer path to `AdapterSpec`; the first one added
        comes first.

    Raises:
        ValueError: If the model has no adapters.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(8), dense(2)])
        >>> report = klp.enable_lora_plus(model, rank=2)
        >>> klp.list_adapters(model)["default"]["layers.0"].rank
        2
    """
    adapted = adapted_layers(model)
    registry = registry_of(model, adapted)
    active = {path: layer.adapter for path, layer in adapted.items()}
    return {
        name: active if name == registry.active else registry.waiting[name].specs
        for name in names_of(registry)
    }


def active_adapter(model):
    """Returns the name of the adapter that a model computes with and trains.

    Args:
        model: A model with adapters.

    Returns:
        The name; `"default"` where none was added.

    Raises:
        ValueError: If the model has no adapters.

    Example:
        See `add_adapter`.
    """
    return registry_of(model, adapted_layers(model)).active


def _check_enabled(adapted):
    for path, layer in adapted.items():
        if float(ops.convert_to_numpy(layer.lora_scaling)) == 0.0:
            raise ValueError(
                f"The adapter of layer '{path}' is disabled. Switch after the "
                "`adapters_disabled` block."
            )


def _spec(active, rank, alpha, init, scaling):
    return AdapterSpec(
        rank=active.rank if rank is None else rank,
        alpha=alpha,
        init=active.init if init is None else init,
        scaling=active.scaling if scaling is None else scaling,
        dropout=active.dropout,
        max_rank=active.max_rank,
    )


def _owned(model, adapted, incoming):
    """Returns what trains now and what the incoming adapter will write to, each variable once."""
    variables = [*what_trains(model, adapted), *(variable for variable, _ in incoming.values)]
    return list({id(variable): variable for variable in variables}.values())


def _state_of(optimizer):
    """Returns the optimizer's variables without the learning rate, None if it has none yet."""
    if not isinstance(optimizer, keras.optimizers.Optimizer) or not optimizer.built:
        return None
    rate = _compat.learning_rate_variable(optimizer)
    return [variable for variable in optimizer.variables if variable is not rate]


def _slots_for(incoming, optimizer, state):
    if state is None:
        return None
    if incoming.optimizer is not None and incoming.optimizer() is optimizer:
        return incoming.slots
    fresh = type(optimizer).from_config(optimizer.get_config())
    fresh.build(_compat.optimized_variables(optimizer))
    return [ops.copy(variable) for variable in _state_of(fresh)]
