"""Saves and loads adapters: A, B and whatever else was trained, in one safetensors file."""

import keras
import numpy as np
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.adapters import files, hub
from keras_loraplus.adapters.base_check import compare_base, factor_ids, fingerprints, other_places
from keras_loraplus.enable import apply_plan, targets_of, undo_plan
from keras_loraplus.layers import AdapterSpec, is_adapted
from keras_loraplus.named import active_adapter, list_adapters
from keras_loraplus.planning import Adaptation, Plan
from keras_loraplus.registry import check_room, put_waiting, waiting_values
from keras_loraplus.structure import check_all_reached, layers_by_path, variables_by_path
from keras_loraplus.version import __version__


def save_adapter(model, path, *, adapter=None, include_trainable=True):
    """Writes the adapters of a model, and what else it trains, to one safetensors file.

    Tensors are keyed by their place in the model, so that auto-numbered layer names do not matter.
    The file also holds each adapter's rank, alpha, init, scaling and dropout, the targets, a digest
    of every tensor, and some samples of the frozen matrices. It is written whole or not at all:
    under a temporary name in the same folder, flushed to the disk, then renamed. A process that is
    killed meanwhile leaves a file `.adapter-*.tmp`, which nothing reads and you can delete.

    Args:
        model: A model with adapters.
        path: Where to write, for example `"adapter.safetensors"`.
        adapter: Name of the adapter to save (`add_adapter`); `None` for the active one.
        include_trainable: Whether to write the other trainable variables too: head, biases,
            norms. Defaults to True, since a model trained with them is not the same without.

    Returns:
        The path.

    Raises:
        ValueError: If the model has no such adapter, or two of its variables cannot be told apart.
        FileNotFoundError: If the folder does not exist.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(8), dense(2)])
        >>> report = klp.enable_lora_plus(model, rank=2)
        >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
        >>> _ = klp.save_adapter(model, path)
        >>> klp.load_adapter(model, path) is model
        True

    Source: the safetensors format, version 0.4 and later.
    """
    if not _has_adapters(model):
        raise ValueError(
            f"The model '{model.name}' has no LoRA+ adapters to save. Enable them first: "
            "`keras_loraplus.enable_lora_plus(model)`."
        )
    adapter = active_adapter(model) if adapter is None else adapter
    waiting = waiting_values(model, adapter)
    specs = list_adapters(model)[adapter]
    places = _places(model, include_trainable, specs)
    factors = factor_ids(model)
    check_all_reached(
        model,
        lambda v: id(v) in factors or (include_trainable and v.trainable),
        [variable for variable, _ in places.values()],
    )
    content = files.AdapterFile(
        adapters={at: spec.own_config() for at, spec in specs.items()},
        base=fingerprints(model),
        library_version=__version__,
        tensors={
            key: _value(waiting.get(id(variable), variable), factor)
            for key, (variable, factor) in places.items()
        },
        targets=targets_of(model),
    )
    files.write(path, content)
    return path


def load_adapter(model, path, *, adapter=None):
    """Loads a file of `save_adapter`, or of KerasHub's `save_lora_weights`, into a model.

    A model without adapters is enabled from the file's own metadata: the same layers with the
    same settings train, and everything else that the file does not hold is frozen. One that
    has adapters must have those of the file. Strict: whatever is missing, unexpected,
    mis-shaped, damaged or not finite is listed in one error, and nothing has been changed. A base
    with other frozen weights than the adapter was trained beside gets a warning.

    A path that ends in `.lora.h5` is a file of KerasHub's `backbone.save_lora_weights`, for a
    KerasHub backbone or task. Keras's own LoRA splits einsum kernels at their last axis; the same
    product can need a higher rank in this library's factors, for a query projection the rank
    times the number of heads. It is loaded at that rank, exactly, and a line says which. The
    file holds no alpha, and KerasHub trains at a scale of 1, so alpha is the rank; nor does it
    hold the biases of adapted layers, which KerasHub trains.

    Args:
        model: The model that the adapter was trained on, with or without adapters.
        path: A file of `save_adapter`, or a `.lora.h5` file of KerasHub.
        adapter: Name of the adapter to load into (`add_adapter`), which is added if the model has
            none so named and stays inactive; `None` for the active one.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a whole adapter file, or does not fit the model.

    Example:
        See `save_adapter`.
    """
    if str(path).endswith(hub.SUFFIX):
        if adapter is not None:
            raise ValueError(
                f"KerasHub's files are loaded into the active adapter. Received: {adapter=}. Make "
                "that one active first: `keras_loraplus.set_adapter(model, name)`."
            )
        hub.load_lora_h5(model, path, _assign)
        return model
    content = files.read(path, strict=False)
    plan = None
    if not _has_adapters(model):
        if adapter is not None:
            raise ValueError(
                f"A named adapter, '{adapter}', needs a model that has adapters and room for more. "
                "Enable it first: `keras_loraplus.enable_lora_plus(model, max_rank=...)`."
            )
        plan = _plan_from_file(model, path, content)
        apply_plan(plan, model)
    try:
        specs = _specs_for(model, content, adapter)
        places = _checked_places(model, path, content, specs)
    except BaseException:
        if plan is not None:
            undo_plan(plan, model)
        raise
    compare_base(model, path, content.base)
    values = {
        id(variable): _loaded(variable, factor, content.tensors[key])
        for key, (variable, factor) in places.items()
    }
    if adapter is not None and adapter != active_adapter(model):
        put_waiting(model, adapter, specs, values)
        return model
    for variable, _ in places.values():
        variable.assign(values[id(variable)])
    return model


def _has_adapters(model):
    return any(is_adapted(layer) for layer in layers_by_path(model).values())


def _value(tensor, factor):
    """Returns what the file holds of a value: A and B without what stands beyond their rank."""
    value = _compat.host_value(tensor)
    if factor is not None:
        value = factor.stripped(value)
    # numpy has no bfloat16 of its own; every bfloat16 is a float32.
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return np.ascontiguousarray(value, "float32" if dtype == "bfloat16" else None)


def _loaded(variable, factor, value):
    """Returns what goes into a variable for what the file holds."""
    value = ops.cast(value, variable.dtype)
    return value if factor is None else factor.padded(value, variable.shape[factor.rank_axis])


def _assign(variable, factor, value):
    variable.assign(_loaded(variable, factor, value))


def _places(model, include_trainable, specs):
    """Returns (variable, factor) by key for what an adapter's file holds, factor None for the rest.

    Args:
        model: A model with adapters.
        include_trainable: Whether to list what trains beside A and B.
        specs: Dict from layer path to the `AdapterSpec` whose factors are meant.
    """
    layers = layers_by_path(model)
    factors = {
        id(getattr(layers[at], name)): factor
        for at, spec in specs.items()
        for name, factor in layers[at].factors(spec).items()
    }
    variables = variables_by_path(
        model,
        lambda v: id(v) in factors or (include_trainable and v.trainable),
    )
    return {key: (variable, factors.get(id(variable))) for key, variable in variables.items()}


def _plan_from_file(model, path, content):
    specs, tensors = content.adapters, content.tensors
    layers = layers_by_path(model)
    missing = sorted(set(specs) - set(layers))
    if missing:
        raise ValueError(
            f"'{path}' holds adapters for layers that '{model.name}' does not have: {missing}. "
            "Load it into the model that it was trained on."
            + (f" It is also damaged: {'; '.join(content.faults)}." if content.faults else "")
        )
    adaptations = tuple(
        Adaptation(layers[at], at, AdapterSpec.from_config(spec)) for at, spec in specs.items()
    )
    names = {key.rpartition("/")[2] for key in tensors}
    kept = variables_by_path(model, lambda v: v.name in names)
    return Plan(
        scope=model,
        adaptations=adaptations,
        skipped=(),
        heads=(),
        kept=tuple(variable for key, variable in kept.items() if key in tensors),
        targets=content.targets,
    )


def _checked_places(model, path, content, specs):
    """Returns the `_places` of the file's tensors, or raises one error with all faults."""
    tensors = content.tensors
    expected = _places(model, True, specs)
    factors = _places(model, False, specs)
    if set(tensors) == set(factors):  # saved with include_trainable=False
        expected = factors
    faults = [*content.faults, *other_places(model, content.base)]
    faults += [f"missing: {key}" for key in sorted(set(expected) - set(tensors))]
    faults += [f"unexpected: {key}" for key in sorted(set(tensors) - set(expected))]
    for key in sorted(set(expected) & set(tensors)):
        (variable, factor), value = expected[key], tensors[key]
        shape = tuple(variable.shape) if factor is None else factor.shape
        if value.shape != shape:
            faults.append(f"shape: {key} is {value.shape} in the file and {shape} in the model")
        elif not np.isfinite(value).all():
            faults.append(f"not finite: {key}")
    for at, spec in specs.items():
        saved, own = content.adapters.get(at), spec.own_config()
        for name in ("rank", "alpha", "scaling"):
            if saved is not None and saved[name] != own[name]:
                faults.append(f"{name}: {at} has {saved[name]} in the file and {own[name]} here")
    if faults:
        raise ValueError(
            f"'{path}' does not fit the model '{model.name}'; nothing was loaded. "
            + "; ".join(faults)
            + (". The file is damaged: fetch it again" if content.faults else "")
            + ". Enable the model with the settings that the adapter was trained with, or load "
            "into a model without adapters to take them from the file."
        )
    return {key: expected[key] for key in tensors}


def _specs_for(model, content, adapter):
    """Returns the settings of a named adapter, those of the file if the model has none so named."""
    listed = list_adapters(model)
    if adapter is None:
        return listed[active_adapter(model)]
    if adapter in listed:
        return listed[adapter]
    room = listed[active_adapter(model)]
    check_room(model, adapter, room)
    return {
        at: AdapterSpec(
            **{**content.adapters.get(at, spec.own_config()), "dropout": spec.dropout},
            max_rank=spec.max_rank,
        )
        for at, spec in room.items()
    }
