"""What a model remembers of its named adapters; `named` has what users call."""

import dataclasses
import warnings
from typing import Any

from keras import ops

from keras_loraplus.layers import is_adapted
from keras_loraplus.structure import layers_by_path

DEFAULT = "default"
_ATTRIBUTE = "_lora_plus_adapters"


@dataclasses.dataclass
class Waiting:
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


class Registry:
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


def adapted_layers(model):
    """Returns the layers with adapters by structural path, or raises if there are none."""
    found = {path: la for path, la in layers_by_path(model).items() if is_adapted(la)}
    if not found:
        raise ValueError(
            f"The model '{model.name}' has no LoRA+ adapters. Enable them first: "
            "`keras_loraplus.enable_lora_plus(model, max_rank=...)`."
        )
    return found


def registry_of(model, adapted):
    """Returns the registry of the model, a new one that nothing refers to if it has none."""
    found = {id(r): r for la in adapted.values() if (r := la.__dict__.get(_ATTRIBUTE)) is not None}
    if not found:
        return Registry(model)
    registry = next(iter(found.values()))
    if len(found) > 1 or registry.model is not model:
        raise ValueError(
            f"The adapters of '{model.name}' were added through the model "
            f"'{registry.model.name}', which knows what else trains with them. Pass that one."
        )
    return registry


def wait(registry, adapted, name, specs):
    """Adds an adapter with initial factors, and copies of what else trains."""
    values = [
        (getattr(layer, factor), value)
        for path, layer in adapted.items()
        for factor, value in layer.initial_factors(specs[path]).items()
    ]
    factors = {id(variable) for variable, _ in values}
    trained = what_trains(registry.model, adapted)
    values += [
        (variable, ops.copy(variable)) for variable in trained if id(variable) not in factors
    ]
    registry.waiting[name] = Waiting(specs, values)
    registry.first_layer = next(iter(adapted.values()))
    for layer in adapted.values():
        layer.__dict__[_ATTRIBUTE] = registry


def names_of(registry):
    """Returns the names of all adapters, the first one that there was before the others."""
    names = [registry.active, *registry.waiting]
    return sorted(names, key=lambda name: (name != DEFAULT, names.index(name)))


def check_name(model, registry, name):
    """Raises unless the model has an adapter of that name."""
    if name not in names_of(registry):
        raise ValueError(
            f"The model '{model.name}' has no adapter named {name!r}. Its adapters: "
            f"{names_of(registry)}. Add it first: `keras_loraplus.add_adapter(model, name)`."
        )


def what_trains(model, adapted):
    """Returns A and B of the layers, and the model's other trainable variables after them."""
    factors = [v for layer in adapted.values() for v in layer.adapter_variables().values()]
    known = {id(variable) for variable in factors}
    return factors + [v for v in model.trainable_variables if id(v) not in known]


def waiting_values(model, name):
    """Returns the values of a named adapter that is not active, by `id` of the variable.

    Args:
        model: A model with adapters.
        name: Name of one; of the active one nothing is returned, the variables hold it.

    Raises:
        ValueError: If there is no such adapter.
    """
    registry = registry_of(model, adapted_layers(model))
    check_name(model, registry, name)
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
    adapted = adapted_layers(model)
    registry = registry_of(model, adapted)
    if name not in registry.waiting:
        wait(registry, adapted, name, specs)
    waiting = registry.waiting[name]
    known = {id(variable) for variable, _ in waiting.values}
    new = [v for v in what_trains(model, adapted) if id(v) in values and id(v) not in known]
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
