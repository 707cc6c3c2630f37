"""Several named adapters on one model: one is active and trains, the others wait.

The variables of a model hold the active adapter. Switching copies values in and out of them, so
that nothing is built, compiled or traced again. What belongs to an adapter is A, B and everything
else that trains (a head, say), and the optimizer's state for them.
"""

import dataclasses
import warnings
import weakref
from typing import Any

import keras
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.layers import AdapterSpec, is_adapted
from keras_loraplus.structure import layers_by_path

DEFAULT = "default"
_ATTRIBUTE = "_lora_plus_adapters"


@dataclasses.dataclass
class _Waiting:
    """An adapter that is not active.

    Attributes:
        specs: Dict from structural layer path to `AdapterSpec`.
        values: Pairs (variable, value) of everything that trains.
        slots: Values of the optimizer's variables, or None where it has no state yet.
        optimizer: Weak reference to the optimizer that the slots are of, or None.
    """

    specs: dict
    values: list
    slots: list | None = None
    optimizer: Any = None


class _Registry:
    """All adapters of one model; every adapted layer of it refers to it.

    A plain object among a layer's attributes: Keras and TensorFlow look into lists and
    dictionaries, and would track what is in them.
    """

    def __init__(self, model):
        self.model = model
        self.active = DEFAULT
        self.waiting = {}
        self.first_layer = None

    def warn_of_saving(self, layer):
        """Says, once for all layers, that Keras saves the active adapter alone."""
        if layer is self.first_layer and self.waiting:
            warnings.warn(
                f"Keras saves the active adapter '{self.active}' of '{self.model.name}' alone, not "
                f"{sorted(self.waiting)}. Save each with "
                "`keras_loraplus.save_adapter(model, path, adapter=name)`.",
                stacklevel=2,
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
    adapted = _adapted(model)
    registry = _registry(model, adapted)
    check_room(model, name, {path: layer.adapter for path, layer in adapted.items()})
    if name in _names(registry):
        raise ValueError(
            f"The model '{model.name}' already has an adapter named '{name}'. Its adapters: "
            f"{_names(registry)}. Choose another name, or delete that one: `delete_adapter`."
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
    _wait(registry, adapted, name, specs)


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
    adapted = _adapted(model)
    registry = _registry(model, adapted)
    _check_name(model, registry, name)
    if name == registry.active:
        return
    _check_enabled(adapted)
    optimizer = getattr(model, "optimizer", None)
    state = _state_of(optimizer)
    incoming = registry.waiting[name]
    slots = _slots_for(incoming, optimizer, state)
    outgoing = _Waiting(
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
    registry = _registry(model, _adapted(model))
    _check_name(model, registry, name)
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
    adapted = _adapted(model)
    registry = _registry(model, adapted)
    active = {path: layer.adapter for path, layer in adapted.items()}
    return {
        name: active if name == registry.active else registry.waiting[name].specs
        for name in _names(registry)
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
    return _registry(model, _adapted(model)).active


def waiting_values(model, name):
    """Returns the values of a named adapter that is not active, by `id` of the variable.

    Args:
        model: A model with adapters.
        name: Name of one; of the active one nothing is returned, the variables hold it.

    Raises:
        ValueError: If there is no such adapter.
    """
    registry = _registry(model, _adapted(model))
    _check_name(model, registry, name)
    if name == registry.active:
        return {}
    return {id(variable): value for variable, value in registry.waiting[name].values}


def put_waiting(model, name, specs, values):
    """Gives a named adapter that is not active new values; adds it if there is none so named.

    Args:
        model: A model with adapters.
        name: Its name.
        specs: Dict from structural layer path to `AdapterSpec`.
        values: Dict from `id` of a variable to its value; what is not in it stays.
    """
    adapted = _adapted(model)
    registry = _registry(model, adapted)
    if name not in registry.waiting:
        _wait(registry, adapted, name, specs)
    waiting = registry.waiting[name]
    known = {id(variable) for variable, _ in waiting.values}
    new = [v for v in _trained(model, adapted) if id(v) in values and id(v) not in known]
    waiting.values = [(v, values.get(id(v), value)) for v, value in waiting.values]
    waiting.values += [(variable, values[id(variable)]) for variable in new]


def check_room(model, name, specs):
    """Raises unless the model has room for adapters beside those of these settings."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"The name of an adapter must be a text. Received: {name!r}.")
    for path, spec in specs.items():
        if spec.max_rank is None:
            raise ValueError(
                f"A and B of layer '{path}' of '{model.name}' have room for one adapter of rank "
                f"{spec.rank} only. Enable the model with the largest rank that its adapters will "
                "have: `keras_loraplus.enable_lora_plus(model, rank=..., max_rank=...)`."
            )


def waiting_adapters(layers):
    """Returns the names of adapters that the layers have beside the active one."""
    registries = [layer.__dict__.get(_ATTRIBUTE) for layer in layers]
    return sorted({name for registry in registries if registry for name in registry.waiting})


def forget_adapters(layers):
    """Makes layers that have been merged forget that they had named adapters."""
    for layer in layers:
        layer.__dict__.pop(_ATTRIBUTE, None)


def _adapted(model):
    found = {path: la for path, la in layers_by_path(model).items() if is_adapted(la)}
    if not found:
        raise ValueError(
            f"The model '{model.name}' has no LoRA+ adapters. Enable them first: "
            "`keras_loraplus.enable_lora_plus(model, max_rank=...)`."
        )
    return found


def _registry(model, adapted):
    """Returns the registry of the model, a new one that nothing refers to if it has none."""
    found = {id(r): r for la in adapted.values() if (r := la.__dict__.get(_ATTRIBUTE)) is not None}
    if not found:
        return _Registry(model)
    registry = next(iter(found.values()))
    if len(found) > 1 or registry.model is not model:
        raise ValueError(
            f"The adapters of '{model.name}' were added through the model "
            f"'{registry.model.name}', which knows what else trains with them. Pass that one."
        )
    return registry


def _wait(registry, adapted, name, specs):
    """Adds an adapter with initial factors, and copies of what else trains."""
    values = [
        (getattr(layer, factor), value)
        for path, layer in adapted.items()
        for factor, value in layer.initial_factors(specs[path]).items()
    ]
    factors = {id(variable) for variable, _ in values}
    trained = _trained(registry.model, adapted)
    values += [
        (variable, ops.copy(variable)) for variable in trained if id(variable) not in factors
    ]
    registry.waiting[name] = _Waiting(specs, values)
    registry.first_layer = next(iter(adapted.values()))
    for layer in adapted.values():
        layer.__dict__[_ATTRIBUTE] = registry


def _names(registry):
    names = [registry.active, *registry.waiting]
    return sorted(names, key=lambda name: (name != DEFAULT, names.index(name)))


def _check_name(model, registry, name):
    if name not in _names(registry):
        raise ValueError(
            f"The model '{model.name}' has no adapter named {name!r}. Its adapters: "
            f"{_names(registry)}. Add it first: `keras_loraplus.add_adapter(model, name)`."
        )


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


def _trained(model, adapted):
    factors = [v for layer in adapted.values() for v in layer.adapter_variables().values()]
    known = {id(variable) for variable in factors}
    return factors + [v for v in model.trainable_variables if id(v) not in known]


def _owned(model, adapted, incoming):
    """Returns what trains now and what the incoming adapter will write to, each variable once."""
    variables = [*_trained(model, adapted), *(variable for variable, _ in incoming.values)]
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
