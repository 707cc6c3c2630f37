"""Compares the frozen weights of a model with those that an adapter was trained beside."""

import collections
import warnings

from keras_loraplus import _compat
from keras_loraplus.adapters.fingerprint import comparable, differs, fingerprint
from keras_loraplus.layers import is_adapted
from keras_loraplus.messages import note
from keras_loraplus.structure import layers_by_path


def fingerprints(model):
    """Returns a `fingerprint` of every frozen matrix that has an adapter, by structural path.

    Beside it stands how many matrices of that shape the model has (`other_places`).
    """
    alike = _matrices_by_shape(model)
    return {
        key: {**fingerprint(kernel), "alike": alike[tuple(kernel.shape)]}
        for key, kernel in _frozen_matrices(model).items()
    }


def other_places(model, base):
    """Returns the faults of adapters that may stand beside another matrix of the same shape.

    A layer more or less moves the positions of others. Where its shape is theirs too, no tensor of
    the file is missing or mis-shaped, but the number of such matrices is another.

    Args:
        model: A model with adapters.
        base: What `fingerprints` returned when the file was saved.

    Returns:
        List of texts.
    """
    alike = _matrices_by_shape(model)
    faults = []
    for key, kernel in _frozen_matrices(model).items():
        saved = base.get(key)
        if saved is None or not comparable(kernel, saved):
            continue
        then, now = saved["alike"], alike[tuple(kernel.shape)]
        if then != now and list(kernel.shape) == saved["shape"]:
            faults.append(
                f"place: {key} was one of {then} matrices of shape {tuple(kernel.shape)} and is "
                f"one of {now}, so that the adapter may belong to another"
            )
    return faults


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


def factor_ids(model):
    """Returns the ids of all A and B below a model, wherever their layers are held."""
    return {
        id(variable)
        for layer in _compat.flatten_layers(model)
        if is_adapted(layer)
        for variable in layer.adapter_variables().values()
    }


def _matrices_by_shape(model):
    """Counts the matrices of each shape, A and B aside."""
    factors = factor_ids(model)
    weights = {id(v): v for v in model.weights if len(v.shape) >= 2 and id(v) not in factors}
    return collections.Counter(tuple(variable.shape) for variable in weights.values())


def _frozen_matrices(model):
    return {
        f"{path}/{name.lstrip('_')}" if path else name.lstrip("_"): layer.frozen_matrix(name)
        for path, layer in layers_by_path(model).items()
        if is_adapted(layer)
        for name in layer.merged_names()
    }
