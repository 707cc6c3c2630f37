"""Saves and loads adapters: A, B and whatever else was trained, in one safetensors file."""

import warnings

import numpy as np
from keras import ops

from keras_loraplus.adapters import files, hub
from keras_loraplus.adapters.fingerprint import comparable, differs, fingerprint
from keras_loraplus.enable import apply_plan, targets_of, undo_plan
from keras_loraplus.layers import AdapterSpec, is_adapted
from keras_loraplus.messages import note
from keras_loraplus.planning import Adaptation, Plan
from keras_loraplus.structure import layers_by_path, variables_by_path
from keras_loraplus.version import __version__


def save_adapter(model, path, *, include_trainable=True):
    """Writes the adapters of a model, and what else it trains, to one safetensors file.

    Tensors are keyed by their place in the model, so that auto-numbered layer names do not matter.
    The file also holds each adapter's rank, alpha, init, scaling and dropout, the targets, a digest
    of every tensor, and some samples of the frozen matrices. It is written whole or not at all:
    under a temporary name in the same folder, flushed to the disk, then renamed. A process that is
    killed meanwhile leaves a file `.adapter-*.tmp`, which nothing reads and you can delete.

    Args:
        model: A model with adapters.
        path: Where to write, for example `"adapter.safetensors"`.
        include_trainable: Whether to write the other trainable variables too: head, biases,
            norms. Defaults to True, since a model trained with them is not the same without.

    Returns:
        The path.

    Raises:
        ValueError: If the model has no adapters, or two of its variables cannot be told apart.
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
    specs = _adapters_of(model)
    if not specs:
        raise ValueError(
            f"The model '{model.name}' has no LoRA+ adapters to save. Enable them first: "
            "`keras_loraplus.enable_lora_plus(model)`."
        )
    variables = _saved_variables(model, include_trainable)
    content = files.AdapterFile(
        adapters=specs,
        base={key: fingerprint(kernel) for key, kernel in _frozen_matrices(model).items()},
        library_version=__version__,
        tensors={key: _value(variable) for key, variable in variables.items()},
        targets=targets_of(model),
    )
    files.write(path, content)
    return path


def load_adapter(model, path):
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

    Returns:
        The same model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a whole adapter file, or does not fit the model.

    Example:
        See `save_adapter`.
    """
    if str(path).endswith(hub.SUFFIX):
        hub.load_lora_h5(model, path, _assign)
        return model
    content = files.read(path)
    plan = None
    if not _adapters_of(model):
        plan = _plan_from_file(model, path, content)
        apply_plan(plan, model)
    try:
        targets = _checked_targets(model, path, content)
    except BaseException:
        if plan is not None:
            undo_plan(plan, model)
        raise
    _compare_base(model, path, content.base)
    for key, variable in targets.items():
        _assign(variable, content.tensors[key])
    return model


def _adapters_of(model):
    return {
        path: layer.adapter.own_config()
        for path, layer in layers_by_path(model).items()
        if is_adapted(layer)
    }


def _frozen_matrices(model):
    return {
        f"{path}/{name.lstrip('_')}" if path else name.lstrip("_"): getattr(layer, name)
        for path, layer in layers_by_path(model).items()
        if is_adapted(layer)
        for name in layer.merged_names()
    }


def _value(variable):
    """Returns what the file holds of a variable."""
    value = ops.convert_to_numpy(variable)
    # numpy has no bfloat16 of its own; every bfloat16 is a float32.
    return np.ascontiguousarray(value, "float32" if variable.dtype == "bfloat16" else None)


def _assign(variable, value):
    """Puts what the file holds into a variable."""
    # A copy: backends may keep the array, and the file's is read-only.
    variable.assign(ops.cast(np.array(value), variable.dtype))


def _compare_base(model, path, base):
    """Warns of other frozen weights, and notes a base that is quantized on one side only."""
    shared = {key: kernel for key, kernel in _frozen_matrices(model).items() if key in base}
    dtypes = {
        (base[key]["dtype"], str(kernel.dtype))
        for key, kernel in shared.items()
        if not comparable(kernel, base[key])
    }
    for then, now in sorted(dtypes):
        note(
            f"'{path}' was trained beside frozen weights of dtype {then}, and those of "
            f"'{model.name}' are {now}: their values were not compared."
        )
    found = {
        key: differs(kernel, base[key])
        for key, kernel in shared.items()
        if comparable(kernel, base[key])
    }
    changed = [f"{key} ({reason})" for key, reason in found.items() if reason]
    if changed:
        warnings.warn(
            f"'{path}' was trained beside other frozen weights than those of '{model.name}': "
            f"{changed[:5]}{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}. Its "
            "outputs will not be those it was trained for. Load the base weights first.",
            stacklevel=3,
        )


def _saved_variables(model, include_trainable):
    factors = {
        id(variable)
        for layer in layers_by_path(model).values()
        if is_adapted(layer)
        for variable in layer.adapter_variables().values()
    }
    return variables_by_path(
        model,
        lambda v: id(v) in factors or (include_trainable and v.trainable),
    )


def _plan_from_file(model, path, content):
    specs, tensors = content.adapters, content.tensors
    layers = layers_by_path(model)
    missing = sorted(set(specs) - set(layers))
    if missing:
        raise ValueError(
            f"'{path}' holds adapters for layers that '{model.name}' does not have: {missing}. "
            "Load it into the model that it was trained on."
        )
    adaptations = tuple(
        Adaptation(layers[at], at, AdapterSpec.from_config(spec)) for at, spec in specs.items()
    )
    kept = variables_by_path(model, lambda v: True)
    return Plan(
        scope=model,
        adaptations=adaptations,
        skipped=(),
        heads=(),
        kept=tuple(variable for key, variable in kept.items() if key in tensors),
        targets=content.targets,
    )


def _checked_targets(model, path, content):
    """Returns {key: variable} for every tensor of the file, or raises one error with all faults."""
    specs, tensors = content.adapters, content.tensors
    expected = _saved_variables(model, include_trainable=True)
    factors = _saved_variables(model, include_trainable=False)
    if set(tensors) == set(factors):  # saved with include_trainable=False
        expected = factors
    faults = [f"missing: {key}" for key in sorted(set(expected) - set(tensors))]
    faults += [f"unexpected: {key}" for key in sorted(set(tensors) - set(expected))]
    for key in sorted(set(expected) & set(tensors)):
        shape, value = tuple(expected[key].shape), tensors[key]
        if value.shape != shape:
            faults.append(f"shape: {key} is {value.shape} in the file and {shape} in the model")
        elif not np.isfinite(value.astype("float32")).all():
            faults.append(f"not finite: {key}")
    for at, spec in _adapters_of(model).items():
        saved = specs.get(at)
        for name in ("rank", "alpha", "scaling"):
            if saved is not None and saved[name] != spec[name]:
                faults.append(f"{name}: {at} has {saved[name]} in the file and {spec[name]} here")
    if faults:
        raise ValueError(
            f"'{path}' does not fit the model '{model.name}'; nothing was loaded. "
            + "; ".join(faults)
            + ". Enable the model with the settings that the adapter was trained with, or load "
            "into a model without adapters to take them from the file."
        )
    return expected
