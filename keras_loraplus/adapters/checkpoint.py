"""One file with everything that a training run of an adapted model changes.

It is an adapter file with more tensors in it. Their keys say what they are: `trained:` A, B and
what else trains, `state:` what training calls write to, `seed:` seed generators, `optimizer:` the
optimizer's variables by position, `random:` random states of the backend, and `position:`, a JSON
text as bytes.
"""

import json
from typing import Any

import numpy as np
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.adapters import files
from keras_loraplus.adapters.base_check import compare_base, fingerprints
from keras_loraplus.enable import trained_before_enabling
from keras_loraplus.layers import is_adapted
from keras_loraplus.named import active_adapter
from keras_loraplus.structure import layers_by_path, variables_by_path
from keras_loraplus.version import __version__

_POSITION = "position:"

# What A, B and the optimizer's moments mean. How A and B began does not matter any more.
_SETTINGS = ("rank", "alpha", "scaling", "dropout")


def write_checkpoint(model, path, epoch, batch):
    """Writes what training has changed in a model, atomically, in the first process only.

    Where one of its variables spans processes, all of them have to come here.

    Args:
        model: A compiled model with adapters.
        path: The file.
        epoch: Index of the epoch to go on with.
        batch: Number of batches of that epoch that are done.
    """
    variables = check_savable(model)
    position = {"epoch": epoch, "batch": batch, **_optimizer_of(model)}
    position["adapter"] = active_adapter(model)
    tensors = {key: _as_saved(variable) for key, variable in variables.items()}
    tensors |= {f"random:{name}": state for name, state in _compat.random_states().items()}
    tensors[_POSITION] = np.frombuffer(json.dumps(position).encode(), "uint8")
    content = files.AdapterFile(
        adapters=_settings(model),
        base=fingerprints(model),
        library_version=__version__,
        tensors=tensors,
    )
    if _compat.is_first_process(model):
        files.write(path, content)


def restore_checkpoint(model, path):
    """Puts a model and its optimizer back to where `write_checkpoint` found them.

    Args:
        model: A compiled model with the same adapters, whose optimizer is built.
        path: The file.

    Returns:
        Dict with `epoch` and `batch`.

    Raises:
        ValueError: If the file is no checkpoint, is damaged, or was written for another model or
            optimizer; nothing has been changed.
    """
    content = files.read(path)
    tensors = dict(content.tensors)
    if _POSITION not in tensors:
        raise ValueError(
            f"'{path}' is an adapter file without a state of training. Expected a file that "
            "`AdapterCheckpoint` wrote. Load it with `keras_loraplus.load_adapter(model, path)`, "
            "and give `AdapterCheckpoint` a path of its own."
        )
    position = json.loads(tensors.pop(_POSITION).tobytes())
    random = {
        key.partition(":")[2]: tensors.pop(key)
        for key in list(tensors)
        if key.startswith("random:")
    }
    variables = check_savable(model)
    faults = _faults(model, variables, content.adapters, tensors, position)
    if faults:
        raise ValueError(
            f"The checkpoint '{path}' does not fit the model '{model.name}'; nothing was loaded. "
            + "; ".join(faults[:20])
            + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
            + ". Enable and compile the model as in the run that wrote it, or give a new run "
            "another path."
        )
    compare_base(model, path, content.base)
    for key, variable in variables.items():
        variable.assign(_as_variable(tensors[key], variable))
    if _compat.is_first_process(model):
        # Others keep their own: the same dropout in all processes would be wrong.
        _compat.restore_random_states(random)
    return {"epoch": position["epoch"], "batch": position["batch"]}


def check_savable(model):
    """Returns all variables of a checkpoint by key.

    Raises:
        ValueError: If the model has no adapters, or trains a variable that has no place of its own
            among its layers.
    """
    if not _settings(model):
        raise ValueError(
            f"The model '{model.name}' has no LoRA+ adapters. Enable them before training: "
            "`keras_loraplus.enable_lora_plus(model)`; without adapters use "
            "`keras.callbacks.BackupAndRestore`."
        )
    trained = _trained(model)
    known = {id(variable) for variable in trained.values()}
    lost = [v.path for v in model.trainable_variables if id(v) not in known]
    if lost:
        raise ValueError(
            f"These variables train but belong to no layer that is an attribute of the model: "
            f"{lost}. A checkpoint could not say where they belong. Assign their layers to "
            "attributes, or to lists or dictionaries that are attributes."
        )
    found = {f"trained:{key}": variable for key, variable in trained.items()}
    state = {id(v) for layer in layers_by_path(model).values() for v in _changed_by_calls(layer)}
    others = variables_by_path(model, lambda v: id(v) in state)
    found |= {f"state:{key}": variable for key, variable in others.items()}
    seen: set = set()
    for path, layer in layers_by_path(model).items():
        for number, generator in enumerate(_compat.seed_generators(layer)):
            if id(generator) not in seen:
                seen.add(id(generator))
                found[f"seed:{path}/{number}"] = generator.state
    if model.optimizer is not None:
        own = enumerate(model.optimizer.variables)
        found |= {f"optimizer:{number}": variable for number, variable in own}
    return found


def _settings(model):
    return {
        path: layer.adapter.get_config()
        for path, layer in layers_by_path(model).items()
        if is_adapted(layer)
    }


def _trained(model):
    factors = {
        id(variable)
        for layer in layers_by_path(model).values()
        if is_adapted(layer)
        for variable in layer.adapter_variables().values()
    }
    return variables_by_path(model, lambda v: v.trainable or id(v) in factors)


def _changed_by_calls(layer):
    """Returns what is no frozen weight among a layer's own non-trainable variables.

    Moving statistics, counters and the like; frozen weights are what makes a model large.
    """
    if getattr(layer, "quantization_mode", None) is not None:
        return []
    frozen = {id(variable) for variable in trained_before_enabling(layer)}
    names: tuple = ()
    if is_adapted(layer):
        names = ("lora_scaling", *layer.frozen_names())
        frozen |= {id(getattr(layer, name)) for name in layer.merged_names()}
        frozen |= {id(variable) for variable in layer.adapter_variables().values()}
    return [
        v for v in _compat.state_variables(layer) if id(v) not in frozen and v.name not in names
    ]


def _optimizer_of(model) -> dict[str, Any]:
    """Returns what positions in the optimizer mean: its class, and what it trains, in order."""
    if model.optimizer is None:
        return {"optimizer": None, "order": []}
    keys = {id(variable): key for key, variable in _trained(model).items()}
    return {
        "optimizer": type(model.optimizer).__name__,
        "order": [keys[id(variable)] for variable in model.trainable_variables],
    }


def _faults(model, variables, adapters, tensors, position):
    faults = []
    here = _optimizer_of(model)
    if position["optimizer"] != here["optimizer"]:
        faults.append(f"optimizer: {position['optimizer']} in the file, {here['optimizer']} here")
    elif position["order"] != here["order"]:
        faults.append(f"trains: {position['order']} in the file, {here['order']} here")
    if position["adapter"] != active_adapter(model):
        faults.append(
            f"active adapter: '{position['adapter']}' in the file, '{active_adapter(model)}' here"
        )
    specs = _settings(model)
    for at in sorted({*adapters, *specs}):
        then, now = (
            {name: spec[at][name] for name in _SETTINGS} if at in spec else None
            for spec in (adapters, specs)
        )
        if then != now:
            faults.append(f"adapter of {at}: {then} in the file, {now} here")
    faults += [f"missing: {key}" for key in sorted(set(variables) - set(tensors))]
    faults += [f"unexpected: {key}" for key in sorted(set(tensors) - set(variables))]
    for key in sorted(set(variables) & set(tensors)):
        shape, value = tuple(variables[key].shape), tensors[key]
        if value.shape != shape:
            faults.append(f"shape: {key} is {value.shape} in the file and {shape} here")
    return faults


def _as_saved(variable):
    value = _compat.host_value(variable)
    if variable.dtype == "bfloat16":  # numpy has none of its own; every bfloat16 is a float32
        value = value.astype("float32")
    elif value.dtype.kind == "u":  # adapter files have no unsigned words
        value = value.astype("int64")
    return np.ascontiguousarray(value).reshape(value.shape)


def _as_variable(value, variable):
    if variable.dtype == "bfloat16":
        return ops.cast(value, "bfloat16")
    return value.astype(variable.dtype)
