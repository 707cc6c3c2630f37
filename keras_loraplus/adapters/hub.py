"""Reads the `.lora.h5` files that KerasHub's `backbone.save_lora_weights` writes."""

import os

import numpy as np

from keras_loraplus import _compat
from keras_loraplus.adapters.last_axis import standard_factors
from keras_loraplus.bypass import bypassed_layers
from keras_loraplus.enable import apply_plan
from keras_loraplus.layers import (
    AdapterSpec,
    LoRAPlusEinsumDense,
    LoRAPlusEmbedding,
    MatrixAdapter,
    is_adapted,
    lora_class_for,
    why_not_adoptable,
)
from keras_loraplus.layers.quantized import matrix_shape
from keras_loraplus.messages import note
from keras_loraplus.planning import Adaptation, Plan, layer_path

SUFFIX = ".lora.h5"


def load_lora_h5(model, path, assign):
    """Loads a `.lora.h5` file into a KerasHub backbone or task, exactly.

    Such a file knows its layers by their place in the backbone's list of layers with weights, and
    holds no alpha: KerasHub's `enable_lora` trains at a scale of 1, so alpha is the rank here. An
    einsum kernel is split at its last axis there and by its equation here, which can need a higher
    rank (`standard_factors`); a line says which.

    Args:
        model: A KerasHub backbone or task. Without adapters, it is enabled on the layers of the
            file and everything else is frozen as `enable_lora_plus` does; with adapters, they have
            to be on those layers, of those ranks and of scale 1.
        path: The file.
        assign: Function of a variable, its `Factor` and an array, which puts the array into it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a file, or does not fit; nothing has been changed.
    """
    backbone = _compat.hub_backbone(model)
    if backbone is None:
        raise ValueError(
            f"'{path}' is a file of KerasHub's `save_lora_weights`, which fits a KerasHub backbone "
            f"or task. Received: {model!r} (of type {type(model).__name__})."
        )
    rank, pairs = _read(path)
    factors, faults = _converted(backbone, rank, pairs)
    adapted = [layer for layer in _compat.flatten_layers(backbone) if is_adapted(layer)]
    if adapted:
        faults += _misfits(adapted, factors)
    if faults:
        raise ValueError(
            f"'{path}' does not fit the backbone '{backbone.name}'; nothing was loaded. "
            + "; ".join(faults)
            + ". Load it into the architecture that it was saved from, without adapters or with "
            "adapters of these ranks and alpha = rank."
        )
    if not adapted:
        apply_plan(_plan(backbone, factors), model)
    for layer, values in factors.items():
        for factor, value in zip(layer.factors().values(), values, strict=True):
            assign(getattr(layer, factor.name), factor, value)
    _say_ranks(path, rank, factors)


def _read(path):
    """Returns the rank and {index: (a, b)}."""
    import h5py  # comes with Keras

    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        with h5py.File(path, "r") as file:
            group = file["lora"]
            rank = int(group["vars"]["rank"][()])
            pairs = {
                int(index): tuple(
                    _as_float32(group[index]["vars"][f"lora_kernel_{side}"]) for side in "ab"
                )
                for index in group
                if index != "vars"
            }
    except Exception as error:  # HDF5 fails on a damaged file in any way
        raise ValueError(
            f"'{path}' is not a whole file of KerasHub's `save_lora_weights`: "
            f"{type(error).__name__}: {error}. Save or fetch it again."
        ) from error
    if not pairs:
        raise ValueError(f"'{path}' holds no adapters.")
    return rank, pairs


def _as_float32(dataset):
    value = dataset[()]
    if dataset.attrs.get("dtype") == "bfloat16":  # the upper half of a float32
        return (value.view("uint16").astype("uint32") << 16).view("float32")
    return value.astype("float32")


def _converted(backbone, rank, pairs):
    """Returns {layer: (A, B)} for every layer of the file that fits, and the faults of the rest."""
    layers = [layer for layer in _compat.flatten_layers(backbone) if layer is not backbone]
    indexed = [layer for layer in layers if layer.weights]
    bypassed = bypassed_layers([backbone, *layers])
    factors, faults = {}, []
    for index, (a, b) in sorted(pairs.items()):
        if not 0 <= index < len(indexed):
            faults.append(f"layer {index}: the backbone has {len(indexed)} layers with weights")
            continue
        layer = indexed[index]
        reason = None if is_adapted(layer) else why_not_adoptable(layer)
        reason = reason or bypassed.get(id(layer)) or _why_not_of(layer, rank, a, b)
        if reason:
            faults.append(f"layer {index}, '{layer_path(layer)}': {reason}")
        elif lora_class_for(type(layer)) is LoRAPlusEinsumDense:
            factors[layer] = standard_factors(layer.equation, a, b)
        else:
            factors[layer] = (a, b)
    return factors, faults


def _why_not_of(layer, rank, a, b):
    if issubclass(lora_class_for(type(layer)), LoRAPlusEmbedding):
        return "KerasHub saves no adapters of embeddings"
    if issubclass(lora_class_for(type(layer)), MatrixAdapter):
        return f"KerasHub saves no adapters of a {type(layer).__name__}"
    shape = matrix_shape(layer, "_kernel")
    expected = (*shape[:-1], rank), (rank, shape[-1])
    if (a.shape, b.shape) != expected:
        return f"its factors have shapes {a.shape} and {b.shape} in the file, expected {expected}"
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return "its factors are not finite"
    return None


def _misfits(adapted, factors):
    faults = [f"missing: {layer_path(layer)}" for layer in adapted if layer not in factors]
    for layer, (a, _) in factors.items():
        if not is_adapted(layer):
            faults.append(f"unexpected: {layer_path(layer)}")
            continue
        if layer.adapter.rank != a.shape[-1]:
            faults.append(
                f"rank: {layer_path(layer)} needs {a.shape[-1]} and has {layer.adapter.rank}"
            )
        if layer.adapter.scale != 1.0:
            faults.append(f"scale: {layer_path(layer)} needs 1 and has {layer.adapter.scale:g}")
    return faults


def _plan(backbone, factors):
    return Plan(
        scope=backbone,
        adaptations=tuple(
            # A random and B zero is what Keras's own LoRA begins with.
            Adaptation(layer, layer_path(layer), AdapterSpec(rank=a.shape[-1], init="lora"))
            for layer, (a, _) in factors.items()
        ),
        skipped=(),
        heads=(),
        kept=(),
        targets=sorted({layer.name for layer in factors}),
    )


def _say_ranks(path, rank, factors):
    raised: dict = {}
    for layer, (a, _) in factors.items():
        if a.shape[-1] != rank:
            raised.setdefault(a.shape[-1], []).append(layer_path(layer))
    if raised:
        ranks = "; ".join(
            f"rank {higher} on {len(paths)} layers ({', '.join(paths[:3])}"
            f"{', ...' if len(paths) > 3 else ''})"
            for higher, paths in sorted(raised.items())
        )
        note(
            f"'{path}': adapters of rank {rank} that Keras splits at the kernel's last axis became "
            f"{ranks}, which is exact."
        )
