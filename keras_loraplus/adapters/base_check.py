"""Compares the frozen weights of a model with those that an adapter was trained beside."""

import warnings

from keras_loraplus.adapters.fingerprint import comparable, differs, fingerprint
from keras_loraplus.layers import is_adapted
from keras_loraplus.messages import note
from keras_loraplus.structure import layers_by_path


def fingerprints(model):
    """Returns a `fingerprint` of every frozen matrix that has an adapter, by structural path."""
    return {key: fingerprint(kernel) for key, kernel in _frozen_matrices(model).items()}


def compare_base(model, path, base):
    """Warns of other frozen weights, and notes a base that is quantized on one side only.

    Args:
        model: A model with adapters.
        path: The adapter's file, for the text.
        base: What `fingerprints` returned when it was saved.
    """
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
            stacklevel=4,
        )


def _frozen_matrices(model):
    return {
        f"{path}/{name.lstrip('_')}" if path else name.lstrip("_"): getattr(layer, name)
        for path, layer in layers_by_path(model).items()
        if is_adapted(layer)
        for name in layer.merged_names()
    }
