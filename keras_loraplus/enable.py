"""Enables LoRA+ on a model, and merges it away again."""

import json

import keras
import numpy as np
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.layers import adopt, is_adapted, release
from keras_loraplus.layers.quantized import give_gradient, take_gradient
from keras_loraplus.layers.requantize import release_as_float, requantized
from keras_loraplus.planning import layer_path, make_plan
from keras_loraplus.registry import forget_adapters, waiting_adapters
from keras_loraplus.report import AdaptedLayer, Report, count_parameters
from keras_loraplus.requantizing import check_requantizable, say_errors

_BEFORE = "_before_lora_plus"
_TARGETS = "_lora_plus_targets"

# Layers that write to their frozen variables when they are called with `training=True`.
_CHANGED_BY_TRAINING_CALLS = (
    keras.layers.BatchNormalization,
    keras.layers.SpectralNormalization,
)


def enable_lora_plus(
    model,
    rank=8,
    alpha=None,
    *,
    targets=None,
    exclude=(),
    init="loraplus",
    scaling="standard",
    dropout=0.0,
    max_rank=None,
    rank_pattern=None,
    alpha_pattern=None,
    trainable=(),
):
    """Freezes a model and gives its layers trainable low-rank adapters, in place.

        y = x W + s (x A) B,    s = alpha / rank

    The outputs do not change, because A B is zero at the start. On a KerasHub task the backbone
    is adapted and the head left as it is. Everything else is frozen, biases of adapted layers
    included. A compiled model loses its compiled state, so that `fit` asks for `compile` first.
    (Where only a part of a compiled model is passed, the outer model cannot be seen from
    here: compile it again with a new optimizer.)

    Args:
        model: A built `keras.Model`, a KerasHub backbone or a KerasHub task.
        rank: Positive integer r. Defaults to 8.
        alpha: Strength of the adapters; `None` means each layer's rank, a scale of 1.
        targets: `None` for `backbone.default_lora_layer_names()` on KerasHub (`"all-linear"` where
            a backbone has none of them) and, elsewhere, every supported layer but those that
            produce the outputs; `"all-linear"` for every `Dense` and `EinsumDense` but those, or,
            in a model that has neither, every convolution; or layer names and regular expressions
            that fullmatch a layer path.
        exclude: Names and regular expressions of targeted layers to leave out.
        init: `"loraplus"` (A zero, B random), `"lora"` (A random, B zero) or a pair of Keras
            initializers. With the names, one `keras.utils.set_random_seed` draws the same values
            on every backend.
        scaling: `"standard"` (s = alpha / r) or `"rslora"` (s = alpha / sqrt(r)).
        dropout: Rate at which each adapter's input is dropped while training.
        max_rank: Rank up to which every A and B has room, filled with zeros, so that named adapters
            of other ranks can share the model (`add_adapter`); `None` means each layer's rank.
        rank_pattern: Dict from layer name or regular expression to that layer's rank.
        alpha_pattern: Dict from layer name or regular expression to that layer's alpha.
        trainable: Regular expressions that fullmatch paths of variables to leave trainable, for
            example `".*layer_norm.*"`. Kernels of adapted layers stay frozen.

    Returns:
        A `Report`: adapted layers, what was not adaptable and why, and parameter counts.

    Raises:
        ValueError: If a setting is out of range, a pattern matches nothing, the model is not built,
            is enabled already, uses Keras's own LoRA, or was not made under the current
            distribution (`tf.distribute` strategy). The model is unchanged.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(8), dense(2)])
        >>> report = enable_lora_plus(model, rank=2)
        >>> [layer.rank for layer in report.adapted], report.trainable_parameters
        ([2], 42)

    Source: Hayou et al., "LoRA+", arXiv 2402.12354; Hu et al., arXiv 2106.09685.
    """
    spec_arguments = {
        "rank": rank,
        "alpha": alpha,
        "init": init,
        "scaling": scaling,
        "dropout": dropout,
        "max_rank": max_rank,
    }
    plan = make_plan(
        model, targets, exclude, trainable, spec_arguments, rank_pattern, alpha_pattern
    )
    apply_plan(plan, model)
    return _report(plan, model)


def apply_plan(plan, model):
    """Does what a plan says, or, if anything fails, nothing.

    Args:
        plan: A `Plan` for the model.
        model: The user's model; the plan's scope is it or a part of it.
    """
    _compat.check_distribution(model)
    for layer in _compat.flatten_layers(model):
        layer.__dict__[_BEFORE] = _compat.tracked_state(layer)
    try:
        for adaptation in plan.adaptations:
            adopt(adaptation.layer, adaptation.spec)
        _freeze_the_rest(plan)
        _compat.own_trainable_flag(model, True)
        _compat.refresh_torch_parameters(_compat.flatten_layers(model))
    except BaseException:
        undo_plan(plan, model)
        raise
    # As text: Keras walks lists among a layer's attributes when it saves.
    plan.scope.__dict__[_TARGETS] = json.dumps(plan.targets)
    _compat.clear_compiled_state(model)
    if plan.scope is not model:
        _compat.clear_compiled_state(plan.scope)


def undo_plan(plan, model):
    """Takes every adapter of a plan away again and puts all trainable flags back."""
    for adaptation in plan.adaptations:
        if is_adapted(adaptation.layer):
            release(adaptation.layer)
    _restore_flags(_compat.flatten_layers(model))


def targets_of(model):
    """Returns the `targets` that a model, or a part of it, was enabled with.

    Args:
        model: A model with adapters.

    Returns:
        A text or a list of texts; None for the default, and where they are not known because the
        model was loaded with its adapters.
    """
    for layer in _compat.flatten_layers(model):
        if _TARGETS in layer.__dict__:
            return json.loads(layer.__dict__[_TARGETS])
    return None


def _freeze_the_rest(plan):
    heads = {id(inner) for head in plan.heads for inner in _compat.flatten_layers(head)}
    kept = {id(variable) for variable in plan.kept}
    scope = [layer for layer in _compat.flatten_layers(plan.scope) if id(layer) not in heads]
    for layer in scope:
        train = kept
        if is_adapted(layer):
            train = kept | {id(variable) for variable in layer.adapter_variables().values()}
        own = layer._trainable_variables
        _compat.freeze_variables(layer, [variable for variable in own if id(variable) not in train])
        for variable in layer._trainable_variables:
            if id(variable) in train:
                variable.trainable = True
    for layer in scope:
        if not is_adapted(layer):
            give_gradient(layer)
        trains = any(variable.trainable for variable in layer.weights)
        # A layer in which nothing trains is frozen as a whole, so that batch normalisation runs
        # in inference mode; one that holds a trained variable must not hide it.
        if layer.weights and layer is not plan.scope:
            _compat.own_trainable_flag(layer, trains)
        if isinstance(layer, _CHANGED_BY_TRAINING_CALLS) and not trains:
            _compat.run_in_inference_mode(layer)
    _compat.own_trainable_flag(plan.scope, True)


def _restore_flags(layers):
    _compat.refresh_torch_parameters(layers)
    for layer in layers:
        _compat.run_in_any_mode(layer)
        take_gradient(layer)
        layer.__dict__.pop(_TARGETS, None)
        before = layer.__dict__.pop(_BEFORE, None)
        if before is not None:
            _compat.restore_tracked_state(layer, before)


def trained_before_enabling(layer):
    """Returns the layer's own variables that were trainable before the model was enabled.

    Args:
        layer: Any layer of the model.

    Returns:
        List of variables; empty for a model that was loaded with its adapters.
    """
    before = layer.__dict__.get(_BEFORE)
    return [] if before is None else [variable for variable, _ in before.trainable]


def _report(plan, model):
    adapted = tuple(
        AdaptedLayer(
            adaptation.path,
            type(adaptation.layer).__name__,
            adaptation.spec.rank,
            adaptation.spec.alpha,
            {
                name: tuple(variable.shape)
                for name, variable in adaptation.layer.adapter_variables().items()
            },
        )
        for adaptation in plan.adaptations
    )
    return Report(
        adapted=adapted,
        skipped=plan.skipped,
        heads=tuple(layer_path(layer) for layer in plan.heads),
        trainable=tuple(variable.path for variable in model.trainable_variables),
        trainable_parameters=count_parameters(model.trainable_variables),
        total_parameters=count_parameters(model.weights),
    )


def merge_lora_plus(model, dequantize=False):
    """Merges every adapter into its kernel and leaves a plain Keras model, in place.

        W <- W + s A B    (in float32, cast to the kernel's dtype)

    A quantized kernel is quantized again, in its own mode; a line says what the rounding costs, and
    `requantization_errors` beforehand. With `dequantize=True` adapted layers become float instead,
    exactly; the matrices are new variables then, so an outer model has to be compiled again.

    Final: the layers are of their original classes, A and B are gone, and every trainable flag is
    that from before enabling. Outputs stay the same, also those of an outer model that has
    already traced `predict`: its trace reads the merged kernel, and a scale of 0 for the adapter.
    The compiled state of `model` is cleared, so that `fit` asks for `compile` first.

    Args:
        model: A model with adapters, or any part of one.
        dequantize: Whether quantized layers that have adapters become float layers.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no adapters, they are disabled, it has named adapters beside
            the active one, a kernel cannot be quantized again (GPTQ, AWQ), or a merged kernel would
            hold NaN or infinity; the model is unchanged.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(8), dense(2)])
        >>> report = enable_lora_plus(model, rank=2)
        >>> merge_lora_plus(model) is model
        True

    Source: Hu et al., arXiv 2106.09685, section 4.2.
    """
    layers = _compat.flatten_layers(model)
    adapted = [layer for layer in layers if is_adapted(layer)]
    if not adapted:
        raise ValueError(
            f"The model '{model.name}' has no LoRA+ adapters to merge. Either it was merged "
            "already, or `keras_loraplus.enable_lora_plus(model)` has not been called."
        )
    waiting = waiting_adapters(adapted)
    if waiting:
        raise ValueError(
            f"Merging is final, and the model '{model.name}' has adapters beside the active one "
            f"that would be lost: {waiting}. Nothing was merged. Save them "
            "(`keras_loraplus.save_adapter(model, path, adapter=name)`) and delete them "
            "(`keras_loraplus.delete_adapter(model, name)`) first."
        )
    for layer in adapted:
        _check_merge(layer, dequantize)
    errors: list = []
    for layer in adapted:
        values = layer.merged_values()
        if layer.quantization_mode is not None:
            if dequantize:
                release_as_float(layer, values, lambda layer: _restore_flags([layer]))
                continue
            values, own = requantized(layer, values)
            errors += own
        for name, value in values.items():
            getattr(layer, name).assign(value)
        release(layer)
    say_errors(model, errors)
    forget_adapters(adapted)
    _restore_flags(layers)
    if hasattr(model, "predict_function"):
        _compat.clear_compiled_state(model)
    return model


def _check_merge(layer, dequantize):
    if float(ops.convert_to_numpy(layer.lora_scaling)) == 0.0:
        raise ValueError(
            f"The adapter of layer '{layer_path(layer)}' is disabled, so that merging would change "
            "the outputs. Nothing was merged. Merge after the `adapters_disabled` block."
        )
    if layer.quantization_mode is not None and not dequantize:
        check_requantizable(layer)
    if layer.merges_finitely():
        return
    for name, value in layer.merged_values().items():
        if not bool(ops.all(ops.isfinite(ops.cast(value, "float32")))):
            parts = {
                key: bool(np.isfinite(ops.convert_to_numpy(variable)).all())
                for key, variable in layer.adapter_variables().items()
            }
            raise ValueError(
                f"Merging would put NaN or infinity into '{name.lstrip('_')}' of layer "
                f"'{layer_path(layer)}' (finite factors: {parts}). Nothing was merged. Load a good "
                "adapter, or train with a lower rate."
            )
