"""Converts adapter files to PEFT folders and back, for the command line."""

import os

from keras_loraplus import _compat
from keras_loraplus.adapters import files
from keras_loraplus.adapters.native import load_adapter, save_adapter
from keras_loraplus.adapters.peft import export_peft, import_peft
from keras_loraplus.adapters.peft.checkpoint import read_checkpoint
from keras_loraplus.adapters.peft.folder import read_folder
from keras_loraplus.adapters.peft.heads import head_layers, head_variables
from keras_loraplus.structure import variables_by_path

_PROBE = 1009


def convert(
    source, target, checkpoint, *, base=None, prefix=None, task=None, heads=(), task_type=None
):
    """Converts by loading the adapter into its base model, so that all of it is checked.

    Args:
        source: An adapter file of a KerasHub backbone or task, or a PEFT folder.
        target: What to write: a PEFT folder, or an adapter file.
        checkpoint: Hugging Face checkpoint folder of the base model.
        base: `base_model_name_or_path` to write; `None` for the checkpoint.
        prefix: As of `export_peft`.
        task: Name of the KerasHub task that the adapter file is of, for example
            `"TextClassifier"`; `None` for a backbone's.
        heads: Strings `MODULE=LAYER`, a Hugging Face module and the task's layer for it.
        task_type: PEFT's task type to write.

    Raises:
        ValueError: If the source is damaged, does not fit the checkpoint, or cannot be said in the
            other format.
        FileNotFoundError: If the source or the checkpoint does not exist.
    """
    modules = _modules(heads)
    if modules and task is None:
        raise ValueError(
            "--head names a layer of a task. Received no --task: name its class, for example "
            "--task TextClassifier."
        )
    if not os.path.exists(source):
        raise FileNotFoundError(f"There is no '{source}'.")
    # Before the slow part: KerasHub takes the name of a missing folder for that of a preset.
    read_checkpoint(checkpoint)
    to_peft = not os.path.isdir(source)
    content = files.read(source).tensors if to_peft else read_folder(source)[1]
    model = _compat.hub_backbone_from(checkpoint)
    if task is not None:
        model = _task(model, task, modules, content, to_peft)
    if not to_peft:
        import_peft(model, source, checkpoint=checkpoint, modules_to_save=modules)
        save_adapter(model, target)
        return
    try:
        load_adapter(model, source)
    except ValueError as error:
        if task is not None:
            raise
        raise ValueError(
            f"{error} It was loaded into a backbone; if it is of a task, name its class and its "
            "head: --task TextClassifier --head classifier=logits."
        ) from error
    export_peft(
        model,
        target,
        base or checkpoint,
        checkpoint=checkpoint,
        prefix=prefix,
        modules_to_save=modules,
        task_type=task_type,
    )


def _modules(heads):
    """Returns {Hugging Face module: layer name} of strings `MODULE=LAYER`."""
    modules = {}
    for text in heads:
        module, _, layer = text.partition("=")
        if not module or not layer or module in modules:
            raise ValueError(
                "--head: expected MODULE=LAYER, each module once, for example classifier=logits. "
                f"Received: {text!r}."
            )
        modules[module] = layer
    return modules


def _task(backbone, name, modules, content, is_file):
    """Returns the task around a backbone, with as many classes as the adapter's head has.

    A first task has a number of classes that no layer has by chance; the variables that show it
    are those of the head, and the file says their true size.

    Args:
        backbone: A KerasHub backbone.
        name: Name of a class of `keras_hub.models`.
        modules: Dict from Hugging Face module to the name of a layer.
        content: Dict from key to value, of an adapter file or a PEFT folder.
        is_file: Whether `content` is that of an adapter file.
    """
    probe = _compat.hub_task_around(backbone, name, _PROBE)
    heads = head_layers(probe, modules)
    if is_file:
        keys = variables_by_path(probe, lambda v: _PROBE in v.shape)
    else:
        keys = {key: v for key, (v, _) in head_variables(heads).items() if _PROBE in v.shape}
    sizes = {
        _along_classes(content[key], v, is_file)
        for key, v in keys.items()
        if key in content and content[key].ndim == len(v.shape)
    }
    if not keys:
        return probe
    if len(sizes) > 1:
        raise ValueError(f"The head has different numbers of classes: {sorted(sizes)}.")
    # Without a head the adapter does not depend on the number of classes.
    return _compat.hub_task_around(backbone, name, sizes.pop() if sizes else 2)


def _along_classes(value, variable, is_file):
    """Returns the size of a value where the variable has its classes; torch's weights transpose."""
    axis = tuple(variable.shape).index(_PROBE)
    return value.shape[axis if is_file else len(variable.shape) - 1 - axis]
