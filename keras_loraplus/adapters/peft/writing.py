"""Writes the adapters of a KerasHub model as a PEFT folder."""

import os

from keras import ops

from keras_loraplus import _compat
from keras_loraplus.adapters.peft.checkpoint import read_checkpoint
from keras_loraplus.adapters.peft.config import config_text
from keras_loraplus.adapters.peft.folder import bias_key, factor_keys, write_folder
from keras_loraplus.adapters.peft.heads import head_layers, head_value, head_variables
from keras_loraplus.adapters.peft.mapping import fused, to_peft
from keras_loraplus.adapters.peft.matrices import ModuleMap, why_not_of_logits
from keras_loraplus.layers import is_adapted
from keras_loraplus.messages import note
from keras_loraplus.planning import layer_path


def export_peft(
    model,
    folder,
    base_model_name_or_path=None,
    *,
    checkpoint=None,
    prefix=None,
    modules_to_save=None,
    include_trainable=True,
    task_type=None,
):
    """Writes the adapters of a KerasHub model as a folder that Hugging Face PEFT loads.

        W + s A B here    =    W' + (alpha / r) lora_B lora_A there, in the layout of W'

    The layout of each Hugging Face tensor is learned from KerasHub's own converter, so that every
    architecture works whose tensors it permutes and reshapes. Several layers here that are one
    module there (GPT-2's `c_attn`) become one adapter of the sum of their ranks, exactly.

    Other trained variables of the backbone (norms) are written whole, as PEFT's `modules_to_save`;
    if a bias of an adapted layer was trained, the biases of all of them are (`bias="lora_only"`).
    A task's head has no Hugging Face name that KerasHub knows: name it in `modules_to_save`, or
    pass `include_trainable=False` to leave it out.

    Args:
        model: A KerasHub backbone or task with adapters.
        folder: Where to write `adapter_model.safetensors` and `adapter_config.json`.
        base_model_name_or_path: Name or folder of the Hugging Face model, for the configuration.
        checkpoint: Folder of the Hugging Face checkpoint that the backbone was loaded from; only
            its `config.json` and the headers of its safetensors files are read. `None` means
            `base_model_name_or_path`, which then has to be that folder.
        prefix: What stands before the base model's own names in the model that the adapter is for,
            for example `"bert."` for `BertForSequenceClassification` and `""` for `BertModel`;
            `None` means as in the checkpoint.
        modules_to_save: Dict from Hugging Face module to the name of a `Dense` layer of the model,
            for example `{"classifier": "logits"}`.
        include_trainable: Whether to write what else was trained. Defaults to True.
        task_type: PEFT's task type for the configuration, for example `"SEQ_CLS"`.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no adapters, there is no checkpoint to learn from, or something
            cannot be said in PEFT, each with its name and the reason. Nothing has been written.

    Example:
        >>> klp.export_peft(keras.Sequential(), "folder")
        Traceback (most recent call last):
        ...
        ValueError: PEFT folders are for KerasHub backbones and tasks. Received: a Sequential.

    Source: PEFT 0.21 (github.com/huggingface/peft), `LoraConfig` and its checkpoint format.
    """
    backbone = backbone_of(model)
    adapted = [layer for layer in _compat.flatten_layers(model) if is_adapted(layer)]
    if not adapted:
        raise ValueError(
            f"The model '{model.name}' has no LoRA+ adapters to export. Enable them first: "
            "`keras_loraplus.enable_lora_plus(model)`."
        )
    mapped = ModuleMap(
        backbone, read_checkpoint(checkpoint_folder(checkpoint, base_model_name_or_path))
    )
    heads = head_layers(model, modules_to_save)
    trained = _other_trained(model, adapted)
    mapped.learn([*(m.variable for m in mapped.matrices if m.layer in adapted), *trained])
    faults: list = []
    parts = _adapter_parts(model, mapped, adapted, faults)
    saved = {}
    if include_trainable:
        saved = _saved_tensors(mapped, trained, heads, parts, faults)
    if faults:
        raise ValueError(
            f"The adapters of '{model.name}' cannot be exported; nothing was written. "
            + "; ".join(faults)
            + "."
        )
    if trained and not include_trainable:
        left = [variable.path for variable in trained]
        note(f"'{folder}' holds A and B alone; trained as well, and left out: {left}.")
    _write(folder, base_model_name_or_path, mapped, adapted, parts, saved, heads, prefix, task_type)
    return folder


def backbone_of(model):
    """Returns the backbone of a KerasHub model.

    Raises:
        ValueError: For any other model.
    """
    backbone = _compat.hub_backbone(model)
    if backbone is None:
        raise ValueError(
            "PEFT folders are for KerasHub backbones and tasks. Received: a "
            f"{type(model).__name__}."
        )
    return backbone


def checkpoint_folder(checkpoint, base):
    """Returns the folder to learn from.

    Raises:
        ValueError: If none is named.
    """
    if checkpoint is not None:
        return checkpoint
    if base is not None and os.path.isdir(base):
        return base
    raise ValueError(
        "KerasHub does not know the shapes of Hugging Face tensors; a checkpoint's headers do. "
        f"Received: checkpoint=None and a base model {base!r}, which is no folder here. Pass "
        "checkpoint='FOLDER', the Hugging Face checkpoint that the backbone was loaded from."
    )


def _other_trained(model, adapted):
    factors = {id(v) for layer in adapted for v in layer.adapter_variables().values()}
    unique = {id(v): v for v in model.trainable_variables if id(v) not in factors}
    return list(unique.values())


def factor_values(matrix):
    """Returns A and B of a matrix at the adapter's own rank, float32."""
    layer = matrix.layer
    variables, factors = layer.adapter_variables(), layer.factors()
    return tuple(
        factors[name].stripped(ops.convert_to_numpy(variables[name]))
        for name in (matrix.a, matrix.b)
    )


def _adapter_parts(model, mapped, adapted, faults):
    """Returns {checkpoint's module: [(matrix, layout, lora_A, lora_B)]} and adds to the faults."""
    parts: dict = {}
    known = [matrix.layer for matrix in mapped.matrices]
    for layer in adapted:
        if layer not in known:
            faults.append(f"{layer_path(layer)}: a {type(layer).__name__} has no LoRA module there")
    for matrix in mapped.matrices:
        if matrix.layer not in adapted:
            continue
        reason = why_not_of_logits(model, matrix)
        if reason:
            faults.append(reason)
            continue
        try:
            layout = mapped.layout(matrix)
        except ValueError as error:
            faults.append(str(error))
            continue
        module = mapped.module_of(matrix.variable)
        tensors = to_peft(layout, *factor_values(matrix))
        parts.setdefault(module, []).append((matrix, layout, *tensors))
    flags = {
        layout.transposed
        for entries in parts.values()
        for matrix, layout, *_ in entries
        if not matrix.is_embedding and not layout.window
    }
    if len(flags) > 1:
        faults.append("PEFT has one `fan_in_fan_out` for all modules, and these need both")
    return parts


def _saved_tensors(mapped, trained, heads, parts, faults):
    """Returns {checkpoint's key: value} of everything else that is written."""
    named = {id(variable) for variable, _ in head_variables(heads).values()}
    modules, biases = set(), False
    for variable in trained:
        module = mapped.module_of(variable)
        if id(variable) in named:
            continue
        if module is None:
            faults.append(
                f"{variable.path} was trained and has no Hugging Face name that KerasHub knows: "
                "name its layer, for example modules_to_save={'classifier': 'logits'}, or pass "
                "include_trainable=False"
            )
        elif module in parts:
            biases = True
            if mapped.sources[id(variable)].key != f"{module}.bias":
                faults.append(
                    f"{variable.path} was trained in a module that has an adapter, where PEFT "
                    "saves a bias only; pass include_trainable=False to leave it out"
                )
        else:
            modules.add(module)
    keys = [key for key in mapped.checkpoint.shapes if key.rpartition(".")[0] in modules]
    if biases:
        keys += [f"{m}.bias" for m in parts if f"{m}.bias" in mapped.checkpoint.shapes]
    mapped.learn([s.variable for s in mapped.sources.values() if s.key in keys])
    saved = {}
    for key in keys:
        try:
            saved[key] = mapped.tensor(key)
        except ValueError as error:
            faults.append(f"modules_to_save: {error}")
    return saved


def _write(folder, base, mapped, adapted, parts, saved, heads, prefix, task_type):
    def renamed(name):
        if prefix is not None and name.startswith(mapped.prefix) and name[:8] != "lm_head.":
            name = prefix + mapped.relative(name)
        return mapped.renamed(name)

    tensors: dict = {}
    ranks, scales = {}, {}
    transposed = False
    for module, entries in parts.items():
        matrix, layout = entries[0][:2]
        joined = fused([(a, b, m.layer.adapter.scale) for m, _, a, b in entries])
        name = renamed(module)
        keys = factor_keys(name, matrix.is_embedding)
        rank = joined[0].shape[0]
        shapes = layout.a_shape(rank), layout.b_shape(rank)
        values = (value.reshape(shape) for value, shape in zip(joined[:2], shapes, strict=True))
        tensors.update(zip(keys, values, strict=True))
        ranks[name], scales[name] = rank, joined[2]
        transposed = transposed or (layout.transposed and not matrix.is_embedding)
    biases = {f"{module}.bias" for module in parts} & set(saved)
    whole = set(saved) - biases
    tensors.update({renamed(key): saved[key] for key in whole})
    tensors.update({bias_key(renamed(key.removesuffix(".bias"))): saved[key] for key in biases})
    tensors.update({key: head_value(*variable) for key, variable in head_variables(heads).items()})
    others = {key.rpartition(".")[0] for key in mapped.checkpoint.shapes} - set(parts)
    specs = [layer.adapter for layer in adapted]
    text = config_text(
        base=base if base is None else str(base),
        task_type=task_type,
        modules=ranks,
        scales=scales,
        dropout=max(spec.dropout for spec in specs),
        rslora=all(spec.scaling == "rslora" for spec in specs),
        transposed=transposed,
        saved={renamed(key.rpartition(".")[0]) for key in whole} | set(heads),
        biases=bool(biases),
        targets=_targets(set(ranks), {renamed(module) for module in others}),
    )
    write_folder(folder, tensors, text)


def _targets(modules, others):
    """Returns the last components of the modules, where those name no other, or all in full."""
    short = {module.rpartition(".")[2] for module in modules}
    if any(other.rpartition(".")[2] in short for other in others):
        return modules
    return short
