"""KerasHub: what its files are about, its converters, tasks and layers by name."""

import importlib.util
import inspect
import sys

# KerasHub (0.32.0) exports the backbones of these, not the classes; the names stand for classes
# that need not be imported.
HUB_EXPERTS = {
    "MixtralMoeExperts": "keras_hub.src.models.mixtral.mixtral_decoder.MixtralMoeExperts",
    "QwenMoeExperts": "keras_hub.src.models.qwen_moe.qwen_moe_decoder.QwenMoeExperts",
    "Qwen3MoeExperts": "keras_hub.src.models.qwen3_moe.qwen3_moe_decoder.Qwen3MoeExperts",
    "Qwen3_5MoeExperts": "keras_hub.src.models.qwen3_5_moe.qwen3_5_moe_decoder.Qwen3_5MoeExperts",
    "GptOssExperts": "keras_hub.src.models.gpt_oss.gpt_oss_decoder.GptOssExperts",
}
# Layers of KerasHub (0.32.0) whose own weights no two thin matrices can stand beside.
HUB_NOT_ADAPTABLE = {
    "keras_hub.src.models.rwkv7.rwkv7_layer.RWKV7TimeMix": (
        "the matrices that it holds itself are pairs of thin ones already"
    ),
    "keras_hub.src.models.qwen3_5.qwen3_5_gated_delta_net.Qwen3_5GatedDeltaNet": (
        "what it holds itself is one short filter for each channel"
    ),
}


def loaded(name):
    """Returns a module if the user has imported it, without importing it."""
    return sys.modules.get(name)


def hub_backbone(model):
    """Returns the backbone of a KerasHub backbone or task, or None for any other model.

    Whoever holds such a model has imported keras_hub (0.32.0), so that it need not be imported.
    """
    hub = loaded("keras_hub")
    if hub is None:
        return None
    if isinstance(model, hub.models.Task):
        return model.backbone
    return model if isinstance(model, hub.models.Backbone) else None


def hub_converter(config):
    """Returns KerasHub's converter module for a Hugging Face `config.json`.

    `TransformersPresetLoader` (keras_hub 0.32.0) picks it by model type; KerasHub has no public
    name for its converters.

    Raises:
        ValueError: If KerasHub has none.
    """
    from keras_hub.src.utils.transformers.preset_loader import TransformersPresetLoader

    try:
        return TransformersPresetLoader("", config).converter
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"KerasHub has no converter for model type {config.get('model_type')!r}, so that its "
            "weights have no known Hugging Face names."
        ) from error


def hub_backbone_from(preset):
    """Loads a backbone from a KerasHub preset or a Hugging Face checkpoint folder.

    Raises:
        ImportError: If keras_hub is not installed.
    """
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(
            "Building a backbone needs KerasHub: pip install 'keras-loraplus[hub]'."
        ) from error
    return keras_hub.models.Backbone.from_preset(preset)


def hub_task_around(backbone, name, classes):
    """Builds a KerasHub task around a backbone, with a new head and no preprocessing (0.32.0).

    Args:
        backbone: A KerasHub backbone.
        name: Name of a task class, of the backbone's own or of a general one (`TextClassifier`).
        classes: Number of classes, for a task that has classes.

    Raises:
        ValueError: If there is no such task for the backbone.
    """
    import keras_hub

    tasks: dict = {
        key: value
        for key, value in vars(keras_hub.models).items()
        if isinstance(value, type)
        and issubclass(value, keras_hub.models.Task)
        and getattr(value, "backbone_cls", None) is type(backbone)
    }
    general = getattr(keras_hub.models, name, None)
    # Some classes are exported under two names.
    fitting = {
        value
        for value in tasks.values()
        if isinstance(general, type) and issubclass(value, general)
    }
    if len(fitting) != 1:
        raise ValueError(
            f"--task: expected a KerasHub task for a {type(backbone).__name__}, one of "
            f"{sorted(tasks)}. Received: {name!r}."
        )
    task = fitting.pop()
    has_classes = "num_classes" in inspect.signature(task.__init__).parameters
    arguments = {"num_classes": classes} if has_classes else {}
    return task(backbone=backbone, preprocessor=None, **arguments)


def hub_ties_logits(model):
    """Whether a KerasHub task computes logits with its backbone's token embedding (0.32.0)."""
    hub = loaded("keras_hub")
    return hub is not None and isinstance(model, (hub.models.CausalLM, hub.models.MaskedLM))


def transformers_renames(model_type):
    """Returns pairs (pattern, replacement) from checkpoint names to names of modules.

    transformers 5 (5.24.0) renames the weights of some models, ViT's for example, as it reads them,
    and PEFT goes by the new names. Its tables have no public name. Without transformers, or with
    one that has no tables, names are taken as they are in the checkpoint.
    """
    if importlib.util.find_spec("transformers") is None:
        return []
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
    except ImportError:
        return []
    names = [model_type, MODEL_MAPPING_NAMES.get(model_type)]
    tables = [get_checkpoint_conversion_mapping(name) or [] for name in names if name]
    return [
        (source, target)
        for table in tables
        for entry in table
        if type(entry).__name__ == "WeightRenaming"
        for source, target in zip(entry.source_patterns, entry.target_patterns, strict=True)
    ]


def hub_text_preprocessor(preset, sequence_length):
    """Loads what turns texts into the inputs of a text classifier (keras-hub 0.32.0).

    Raises:
        ImportError: If keras_hub is not installed.
        ValueError: If the preset cannot be loaded.
    """
    return _from_preset("TextClassifierPreprocessor", preset, sequence_length=sequence_length)


def hub_text_classifier(preset, classes, dtype):
    """Loads a text classifier with pretrained weights, a new head and no preprocessing (0.32.0).

    Raises:
        ImportError: If keras_hub is not installed.
        ValueError: If the preset cannot be loaded.
    """
    options = {"num_classes": classes, "preprocessor": None, "dtype": dtype}
    return _from_preset("TextClassifier", preset, **options)


def _from_preset(name, preset, **options):
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(
            "Text classifiers need KerasHub: pip install 'keras-loraplus[hub]'."
        ) from error
    try:
        return getattr(keras_hub.models, name).from_preset(preset, **options)
    except Exception as error:  # of many kinds, from JSON's to HTTP's
        raise ValueError(
            f"Expected a KerasHub preset, or a folder, of a model that {name} can be made of. "
            f"Received: {preset!r}, and KerasHub says: {str(error)[:300]}"
        ) from error
