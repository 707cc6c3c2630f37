"""Reads a PEFT folder into a KerasHub model."""

import dataclasses
import re
from typing import Any

import numpy as np
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.adapters.peft.checkpoint import read_checkpoint
from keras_loraplus.adapters.peft.config import read_config
from keras_loraplus.adapters.peft.folder import read_folder, without_wrapper
from keras_loraplus.adapters.peft.heads import head_layers, head_variables
from keras_loraplus.adapters.peft.mapping import from_peft
from keras_loraplus.adapters.peft.matrices import ModuleMap, why_not_of_logits
from keras_loraplus.adapters.peft.writing import backbone_of, checkpoint_folder
from keras_loraplus.bypass import bypassed_layers
from keras_loraplus.enable import apply_plan
from keras_loraplus.layers import AdapterSpec, is_adapted, why_not_adoptable
from keras_loraplus.planning import Adaptation, Plan, layer_path


def import_peft(model, folder, *, checkpoint=None, modules_to_save=None):
    """Loads a PEFT folder into a KerasHub backbone or task, which then gives the same outputs.

    A model without adapters is enabled on the modules of the folder, with their ranks, alphas and
    dropout, and everything else that the folder does not hold is frozen. One with adapters must
    have the same. Strict: what is missing, unexpected, mis-shaped or not finite is listed in one
    error, and nothing has been changed. A module there that is several layers here (GPT-2's
    `c_attn`) gives each of them an adapter of its rank. Biases that were trained with
    `bias="lora_only"` or `"all"` are loaded, and trainable here. Fields of the configuration that
    this library does not know are ignored where they are None, False or empty, and refused
    otherwise.

    Args:
        model: A KerasHub backbone or task that holds the base weights of the adapter.
        folder: A folder with `adapter_model.safetensors` and `adapter_config.json`.
        checkpoint: Folder of the Hugging Face checkpoint that the backbone was loaded from; only
            its `config.json` and the headers of its safetensors files are read. `None` means
            `base_model_name_or_path` of the configuration, which then has to be that folder.
        modules_to_save: Dict from Hugging Face module to the name of a `Dense` layer of the model
            that takes it, for example `{"classifier": "logits"}`.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        ValueError: If the folder holds what this library does not do, or does not fit the model.

    Example:
        >>> klp.import_peft(keras.Sequential(), "folder")
        Traceback (most recent call last):
        ...
        ValueError: PEFT folders are for KerasHub backbones and tasks. Received: a Sequential.

    Source: PEFT 0.21 (github.com/huggingface/peft), `LoraConfig` and its checkpoint format.
    """
    backbone = backbone_of(model)
    config = read_config(folder)
    factors, others = read_folder(folder)
    others = {without_wrapper(key): value for key, value in others.items()}
    mapped = ModuleMap(backbone, read_checkpoint(checkpoint_folder(checkpoint, config.base)))
    faults: list = []
    found = _Found(specs={}, values=[], kept=[])
    _find_factors(mapped, config, factors, found, faults)
    reasons = (why_not_of_logits(model, matrix) for matrix, _, _ in found.values)
    faults += [reason for reason in reasons if reason]
    _find_others(model, mapped, config, others, modules_to_save, found, faults)
    if not found.specs and not faults:
        faults.append("it holds no adapters")
    adapted = [layer for layer in _compat.flatten_layers(model) if is_adapted(layer)]
    if adapted:
        faults += _misfits(adapted, found.specs)
    else:
        faults += _unadoptable(backbone, found.specs)
    if faults:
        raise ValueError(
            f"'{folder}' does not fit the model '{model.name}'; nothing was loaded. "
            + "; ".join(faults)
            + "."
        )
    if not adapted:
        apply_plan(_plan(backbone, found), model)
    _assign_all(found)
    return model


@dataclasses.dataclass
class _Found:
    """What a folder holds for a model.

    Attributes:
        specs: Dict from layer to `AdapterSpec`.
        values: List of (matrix, A, B).
        kept: List of (variable, value) of everything else.
    """

    specs: dict
    values: list
    kept: list[Any]


def _named(mapped, names):
    """Returns {name in the folder: name in the checkpoint} and the names that match nothing.

    The folder's names may have another prefix than the checkpoint's: it depends on the class of the
    Hugging Face model that was adapted.
    """
    known = {mapped.relative(key): key for key in mapped.checkpoint.shapes}
    known.update({mapped.relative(mapped.renamed(k)): k for k in mapped.checkpoint.shapes})
    known.update({k.rpartition(".")[0]: v.rpartition(".")[0] for k, v in list(known.items())})
    found, unknown = {}, []
    for name in names:
        steps = name.split(".")
        tails = (".".join(steps[start:]) for start in range(len(steps)))
        match = next((known[tail] for tail in tails if tail in known), None)
        if match is None:
            unknown.append(name)
        else:
            found[name] = match
    return found, unknown


def _find_factors(mapped, config, factors, found, faults):
    names, unknown = _named(mapped, factors)
    faults += [f"unexpected: {name}" for name in unknown]
    if config.all_targeted:
        faults += [f"missing: {name}" for name in _left_out(names.values(), mapped)]
    twice = {module for module in names.values() if list(names.values()).count(module) > 1}
    faults += [f"two adapters for one module: {module}" for module in sorted(twice)]
    matrices = {name: mapped.matrices_in(module) for name, module in names.items()}
    mapped.learn([matrix.variable for some in matrices.values() for matrix in some])
    for name, tensors in factors.items():
        if name not in names:
            continue
        if set(tensors) != {"a", "b"}:
            faults.append(f"missing: {'A' if 'b' in tensors else 'B'} of {name}")
        elif not matrices[name]:
            faults.append(f"unexpected: {name}, which is no matrix that can have an adapter here")
        else:
            for matrix in matrices[name]:
                fault = _add_matrix(mapped, config, name, matrix, tensors, found)
                faults += [fault] if fault else []


def _left_out(modules, mapped):
    """Returns modules without an adapter that have one in another block of the model."""
    known = {mapped.module_of(matrix.variable) for matrix in mapped.matrices} - {None}
    numbered = {re.sub(r"\d+", "#", module) for module in modules if re.search(r"\d", module)}
    left = sorted(known - set(modules))
    return [module for module in left if re.sub(r"\d+", "#", module) in numbered]


def _add_matrix(mapped, config, name, matrix, tensors, found):
    """Adds one matrix to what was found, or returns why not."""
    try:
        layout = mapped.layout(matrix)
    except ValueError as error:
        return str(error)
    rank, a, b = config.rank_of(name), tensors["a"], tensors["b"]
    expected = layout.a_shape(rank), layout.b_shape(rank)
    if (a.shape, b.shape) != expected:
        return (
            f"shape: {name} has {a.shape} and {b.shape}, expected {expected[0]} and {expected[1]}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return f"not finite: {name}"
    oriented = not matrix.is_embedding and not layout.window
    if oriented and layout.transposed != config.fan_in_fan_out:
        return f"fan_in_fan_out: {name} needs {layout.transposed}, received {config.fan_in_fan_out}"
    # A random and B zero is what PEFT begins with.
    spec = AdapterSpec(rank, config.alpha_of(name), "lora", config.scaling, config.dropout)
    if found.specs.setdefault(matrix.layer, spec) != spec:
        return f"rank or alpha: {name} and another module are one layer here, and differ"
    found.values.append((matrix, *from_peft(layout, a, b, *matrix.shapes(rank))))
    return None


def _find_others(model, mapped, config, others, modules_to_save, found, faults):
    heads = head_variables(head_layers(model, modules_to_save))
    faults += [f"missing: {key}" for key in sorted(set(heads) - set(others))]
    rest = {key: value for key, value in others.items() if key not in heads}
    names, unknown = _named(mapped, rest)
    faults += [
        f"unexpected: {key} (name its layer: modules_to_save={{module: layer name}})"
        for key in unknown
    ]
    for key, (variable, transposed) in heads.items():
        if key in others:
            value = others[key].T if transposed and others[key].ndim == 2 else others[key]
            faults += _keep(key, variable, value, found)
    by_key: dict = {}
    for source in mapped.sources.values():
        by_key.setdefault(source.key, []).append(source.variable)
    mapped.learn([v for key in names.values() for v in by_key.get(key, ())])
    for name, key in names.items():
        if key not in by_key or rest[name].shape != mapped.checkpoint.shapes[key]:
            faults.append(f"unexpected or mis-shaped: {name}, of shape {rest[name].shape}")
            continue
        for variable in by_key[key]:
            source = mapped.sources[id(variable)]
            if source.index is None:
                faults.append(f"{name}: {source.fault}")
            else:
                value = rest[name].reshape(-1)[source.index]
                faults += _keep(name, variable, value, found)
    for module in config.modules_to_save:
        whole = {key.rpartition(".")[0] for key in others}
        if not any(name == module or name.endswith(f".{module}") for name in whole):
            faults.append(f"missing: {module}, which modules_to_save lists")
    if config.bias != "none":
        adapted = {mapped.module_of(matrix.variable) for matrix, _, _ in found.values}
        expected = {f"{module}.bias" for module in adapted} & set(mapped.checkpoint.shapes)
        lacking = sorted(expected - set(names.values()))
        faults += [f"missing: {key}, with bias={config.bias!r}" for key in lacking]


def _keep(name, variable, value, found):
    if value.shape != tuple(variable.shape):
        return [f"shape: {name} is {value.shape}, expected {tuple(variable.shape)}"]
    if not np.isfinite(value).all():
        return [f"not finite: {name}"]
    found.kept.append((variable, value))
    return []


def _unadoptable(backbone, specs):
    bypassed = bypassed_layers(list(_compat.flatten_layers(backbone)))
    reasons = {layer: why_not_adoptable(layer) or bypassed.get(id(layer)) for layer in specs}
    return [f"{layer_path(layer)}: {reason}" for layer, reason in reasons.items() if reason]


def _misfits(adapted, specs):
    faults = [f"missing: {layer_path(layer)}" for layer in adapted if layer not in specs]
    for layer, spec in specs.items():
        if not is_adapted(layer):
            faults.append(f"unexpected: {layer_path(layer)}")
            continue
        own = layer.adapter
        if own.rank != spec.rank or not np.isclose(own.scale, spec.scale, rtol=1e-6):
            faults.append(
                f"rank and scale: {layer_path(layer)} has {own.rank} and {own.scale:g}, the folder "
                f"{spec.rank} and {spec.scale:g}"
            )
    return faults


def _plan(backbone, found):
    return Plan(
        scope=backbone,
        adaptations=tuple(
            Adaptation(layer, layer_path(layer), spec) for layer, spec in found.specs.items()
        ),
        skipped=(),
        heads=(),
        kept=tuple(variable for variable, _ in found.kept),
        targets=sorted({layer.name for layer in found.specs}),
    )


def _assign_all(found):
    for layer in found.specs:
        # An untied embedding has two adapters, of which the folder may hold one.
        for name, variable in layer.adapter_variables().items():
            if name.endswith("_b"):
                variable.assign(ops.zeros(variable.shape, variable.dtype))
    for matrix, a, b in found.values:
        layer = matrix.layer
        variables, factors = layer.adapter_variables(), layer.factors()
        for name, value in ((matrix.a, a), (matrix.b, b)):
            variables[name].assign(factors[name].padded(value, layer.adapter.width))
    for variable, value in found.kept:
        variable.assign(ops.cast(np.array(value), variable.dtype))
