"""Decides what `enable_lora_plus` will do, and changes nothing.

A model, targets and settings go in; a `Plan` comes out, plain data that a test can print.
"""

import dataclasses
import re
from typing import Any

import keras

from keras_loraplus import _compat
from keras_loraplus.bypass import bypassed_layers
from keras_loraplus.handwritten import why_not_adaptable, why_not_asked_for
from keras_loraplus.layers import (
    AdapterSpec,
    is_adapted,
    kind_of,
    lora_class_for,
    why_not_adoptable,
)
from keras_loraplus.layers.adapter_types import CONVOLUTION, LINEAR, NAMED
from keras_loraplus.outputs import output_layers
from keras_loraplus.reach import uncalled_layers

ALL_LINEAR = "all-linear"
CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """One layer to adapt: where it is and with which settings."""

    layer: Any
    path: str
    spec: AdapterSpec


@dataclasses.dataclass(frozen=True)
class Plan:
    """What enabling will do.

    Attributes:
        scope: The model whose layers are adapted or frozen (a task's backbone).
        adaptations: The layers to adapt, in the model's order.
        skipped: Pairs (path, reason) of layers that cannot be adapted.
        heads: Layers that produce the outputs and stay as they are.
        kept: Further variables that stay trainable.
        targets: The `targets` that were asked for: None, a text, or a list of texts.
    """

    scope: Any
    adaptations: tuple
    skipped: tuple
    heads: tuple
    kept: tuple
    targets: Any = None


def layer_path(layer):
    """Returns the layer's path in its model, or its name where it has none."""
    return layer.path or layer.name


def make_plan(model, targets, exclude, trainable, spec_arguments, rank_pattern, alpha_pattern):
    """Makes the plan, or raises with nothing changed.

    Args:
        model: The user's model.
        targets: None, `"all-linear"`, or names and regexes.
        exclude: Names and regexes of layers to leave out.
        trainable: Regexes on variable paths that stay trainable.
        spec_arguments: Dict of `AdapterSpec` arguments for every layer.
        rank_pattern: Dict from name or regex to rank, or None.
        alpha_pattern: Dict from name or regex to alpha, or None.

    Returns:
        A `Plan`.

    Raises:
        ValueError: If anything does not fit; see `enable_lora_plus`.
    """
    AdapterSpec(**spec_arguments)
    _check_model(model)
    scope = _scope(model)
    layers = [layer for layer in _compat.flatten_layers(scope) if layer is not scope]
    heads = () if _is_hub(scope) or not _wants_heads(targets) else tuple(output_layers(scope))
    head_ids = {id(inner) for head in heads for inner in _compat.flatten_layers(head)}
    candidates = [layer for layer in layers if id(layer) not in head_ids and _holds_matrix(layer)]

    wanted = _targeted(candidates, targets, scope)
    excluded = _excluded(wanted, _as_list(exclude, "exclude"))
    wanted = [layer for layer in wanted if id(layer) not in excluded]
    out_of_reach = bypassed_layers(_compat.flatten_layers(scope))
    out_of_reach.update(uncalled_layers(model, scope))
    by_hand = {id(la): why_not_adaptable(la) for la in candidates}
    if targets is None or targets == ALL_LINEAR:
        # Nobody named these, and nobody should believe that they are adapted.
        listed = {id(la) for la in wanted}
        by_hand.update({id(la): why_not_asked_for(la) for la in candidates if _unasked(la, listed)})
        listed |= {id(la) for la in candidates if by_hand[id(la)]} - excluded
        wanted = [la for la in candidates if id(la) in listed]
    reasons = {
        id(la): by_hand[id(la)] or out_of_reach.get(id(la)) or why_not_adoptable(la)
        for la in wanted
    }
    for layer in _inside_weight_wrappers(layers):
        if id(layer) in reasons:
            reasons[id(layer)] = "a wrapper (SpectralNormalization) rewrites its kernel"
    adapted = [layer for layer in wanted if reasons[id(layer)] is None]
    skipped = tuple((layer_path(la), reasons[id(la)]) for la in wanted if reasons[id(la)])
    if not adapted:
        raise ValueError(
            f"No layer of '{scope.name}' can be adapted with targets={_asked(targets, scope)}, "
            f"exclude={exclude!r}. {_listing(skipped)}{_adaptable_listing(candidates)}"
        )
    _check_explicit_targets(targets, adapted, skipped, candidates)
    specs = _specs(adapted, spec_arguments, rank_pattern, alpha_pattern)
    kept = _kept_variables(layers, adapted, _as_list(trainable, "trainable"))
    return Plan(
        scope=scope,
        adaptations=tuple(
            Adaptation(layer, layer_path(layer), spec)
            for layer, spec in zip(adapted, specs, strict=True)
        ),
        skipped=skipped,
        heads=heads,
        kept=kept,
        targets=targets if targets is None or isinstance(targets, str) else list(targets),
    )


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            "`enable_lora_plus` expects a keras.Model, a KerasHub backbone or a KerasHub task. "
            f"Received: {model!r} (of type {type(model).__name__})."
        )
    layers = _compat.flatten_layers(model)
    unbuilt = [la.name for la in layers if lora_class_for(type(la)) and not la.built]
    if model.built and _compat.runs_its_graph(model):
        # The graph has called all that it uses: a block keeps these and never calls them.
        unbuilt = []
    if not model.built or unbuilt:
        raise ValueError(
            f"The model '{model.name}' is not built, so that its kernels do not exist yet"
            + (f" (unbuilt layers: {unbuilt})" if unbuilt else "")
            + ". Build it first: call it on some data, or `model.build(input_shape)`."
        )
    adapted = [layer_path(layer) for layer in layers if is_adapted(layer)]
    if adapted:
        raise ValueError(
            f"The model '{model.name}' already has LoRA+ adapters, on: {_shortened(adapted)}. "
            "Merge them first: `keras_loraplus.merge_lora_plus(model)`."
        )
    native = [layer_path(layer) for layer in layers if getattr(layer, "lora_enabled", False)]
    if native:
        raise ValueError(
            f"The model '{model.name}' uses Keras's own LoRA, on: {_shortened(native)}. Build it "
            "again without `enable_lora` or `lora_rank`, then enable LoRA+."
        )


def _scope(model):
    """Returns a KerasHub task's backbone, any other model itself."""
    backbone = _compat.hub_backbone(model)
    return model if backbone is None else backbone


def _is_hub(model):
    return hasattr(model, "default_lora_layer_names")


def _wants_heads(targets):
    return targets is None or targets == ALL_LINEAR


def _unasked(layer, listed):
    return kind_of(type(layer)) == NAMED and id(layer) not in listed


def _holds_matrix(layer):
    return any(len(variable.shape) >= 2 for variable in _compat.own_variables(layer)) or (
        lora_class_for(type(layer)) is not None
    )


def _inside_weight_wrappers(layers):
    wrapper = keras.layers.SpectralNormalization
    return [layer.layer for layer in layers if isinstance(layer, wrapper)]


def matches(pattern, layer):
    """Whether a name, or a regex fullmatched on the layer path, means this layer."""
    return pattern in (layer.name, layer_path(layer)) or (
        re.fullmatch(pattern, layer_path(layer)) is not None
    )


def _as_list(patterns, argument):
    if patterns is None:
        return []
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        _check_pattern(pattern, argument)
    return patterns


def _check_pattern(pattern, argument):
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"`{argument}` takes names and regular expressions. Received: {pattern!r}: {error}."
        ) from error


def _targeted(candidates, targets, scope):
    if targets is None and _is_hub(scope):
        names = scope.default_lora_layer_names()
        named = [la for la in candidates if any(matches(name, la) for name in names)]
        # Convolutional backbones have no layers of these names, and some transformers others.
        return named or _all_linear(candidates)
    if targets is None:
        return [layer for layer in candidates if kind_of(type(layer)) != NAMED]
    if targets == ALL_LINEAR:
        return _all_linear(candidates)
    targets = _as_list(targets, "targets")
    unmatched = [t for t in targets if not any(matches(t, la) for la in candidates)]
    if unmatched or not targets:
        raise ValueError(
            f"Targets that matched no layer with weights: {unmatched}. Targets are layer names, "
            'regular expressions that fullmatch a layer path, or "all-linear". '
            + _adaptable_listing(candidates)
        )
    return [la for la in candidates if any(matches(target, la) for target in targets)]


def _all_linear(candidates):
    """Returns the dense layers, or, where there are none, the convolutions."""
    dense = [layer for layer in candidates if kind_of(type(layer)) == LINEAR]
    return dense or [layer for layer in candidates if kind_of(type(layer)) == CONVOLUTION]


def _asked(targets, scope):
    if targets is None and _is_hub(scope):
        return f"None (its default_lora_layer_names: {scope.default_lora_layer_names()})"
    return repr(targets)


def _excluded(wanted, exclude):
    unmatched = [pattern for pattern in exclude if not any(matches(pattern, la) for la in wanted)]
    if unmatched:
        raise ValueError(
            f"Patterns in `exclude` that matched no targeted layer: {unmatched}. Targeted layers: "
            f"{_shortened([layer_path(layer) for layer in wanted])}."
        )
    return {id(la) for la in wanted if any(matches(pattern, la) for pattern in exclude)}


def _check_explicit_targets(targets, adapted, skipped, candidates):
    if targets is None or targets == ALL_LINEAR:
        return
    useless = [
        target
        for target in _as_list(targets, "targets")
        if not any(matches(target, layer) for layer in adapted)
    ]
    skipped_paths = {path for path, _ in skipped}
    useless = [
        target
        for target in useless
        if any(matches(target, la) for la in candidates if layer_path(la) in skipped_paths)
    ]
    if useless:
        raise ValueError(
            f"Targets that matched only layers that cannot be adapted: {useless}. "
            f"{_listing(skipped)}{_adaptable_listing(candidates)}"
        )


def _specs(adapted, arguments, rank_pattern, alpha_pattern):
    ranks = _by_pattern(adapted, rank_pattern, "rank_pattern")
    alphas = _by_pattern(adapted, alpha_pattern, "alpha_pattern")
    specs = []
    for layer in adapted:
        own = dict(arguments)
        if id(layer) in ranks:
            own["rank"] = ranks[id(layer)]
        if id(layer) in alphas:
            own["alpha"] = alphas[id(layer)]
        specs.append(AdapterSpec(**own))
    return specs


def _by_pattern(adapted, patterns, argument):
    """Returns {id(layer): value}; a pattern that matches nothing, or two on one layer, raises."""
    values = {}
    matched_by: dict = {}
    for pattern, value in (patterns or {}).items():
        _check_pattern(pattern, argument)
        found = [layer for layer in adapted if matches(pattern, layer)]
        if not found:
            raise ValueError(
                f"`{argument}` has a pattern that matches no adapted layer: {pattern!r}. Adapted "
                f"layers: {_shortened([layer_path(layer) for layer in adapted])}."
            )
        for layer in found:
            if id(layer) in values:
                raise ValueError(
                    f"`{argument}` has two patterns for layer '{layer_path(layer)}': "
                    f"{matched_by[id(layer)]!r} and {pattern!r}. Make them exclusive."
                )
            values[id(layer)], matched_by[id(layer)] = value, pattern
    return values


def _kept_variables(layers, adapted, patterns):
    kernels = {
        id(variable)
        for layer in adapted
        for variable in _compat.own_variables(layer)
        if variable.name in ("kernel", "embeddings", "reverse_embeddings")
    }
    kernels |= {
        id(vars(layer).get(name))
        for layer in adapted
        for name in lora_class_for(type(layer)).matrix_attributes()
    }
    candidates = [
        variable
        for layer in layers
        for variable in layer._trainable_variables
        if id(variable) not in kernels
    ]
    kept: dict = {}
    for pattern in patterns:
        found = [variable for variable in candidates if re.fullmatch(pattern, variable.path)]
        if not found:
            raise ValueError(
                f"`trainable` has a pattern that fullmatches no variable path: {pattern!r}. Paths "
                f"look like: {_shortened([variable.path for variable in candidates])}. (Kernels of "
                "adapted layers stay frozen.)"
            )
        kept.update((id(variable), variable) for variable in found)
    return tuple(kept.values())


def _listing(skipped):
    if not skipped:
        return ""
    return "Not adaptable: " + "; ".join(f"{path}: {reason}" for path, reason in skipped) + ". "


def _adaptable_listing(candidates):
    paths = [layer_path(layer) for layer in candidates if why_not_adoptable(layer) is None]
    return f"Layers that can be adapted: {_shortened(paths)}."


def _shortened(names, limit=20):
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{names[:limit]}{more}"
