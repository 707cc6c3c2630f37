"""Loads Keras weight files so that nothing in them is dropped, and nothing is half loaded."""

import dataclasses
import os
import warnings

import keras
import numpy as np

from keras_loraplus import _compat
from keras_loraplus.layers import is_adapted
from keras_loraplus.optimizers import early_state


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """The adapter of one layer in a weights file.

    Attributes:
        path: Where the file keeps the layer.
        name: Name of the layer in the model that was saved.
        rank: Rank r.
        scale: s, that is alpha / r or alpha / sqrt(r).
    """

    path: str
    name: str
    rank: int
    scale: float


class _DryRun(keras.StatelessScope):
    """Lets assignments check shapes and dtypes, and notes them instead of doing them."""

    def __init__(self):
        super().__init__()
        self.assigned = set()

    def add_update(self, update):
        variable, _ = update
        self.assigned.add(id(variable))


def load_weights(model, filepath):
    """Loads a `.weights.h5` file into a model, the whole file or nothing.

    What `model.load_weights(filepath)` does, with three differences. Adapters in the file that the
    model does not have are always an error, which tells how to enable them. So are weights of the
    model that the file does not hold; only a file of the model before it was adapted leaves A and B
    as they are. And an error leaves every variable as it was: the file is first read without
    assigning anything. Optimizer state is loaded too, also before the optimizer is built.

    Args:
        model: A built model, with or without adapters.
        filepath: A file of `model.save_weights`.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the name does not end in `.weights.h5`, or the file does not fit the model;
            nothing has been changed.

    Example:
        >>> dense = keras.layers.Dense
        >>> make = lambda: keras.Sequential([keras.Input((4,)), dense(8, name="a"), dense(2)])
        >>> model = make()
        >>> report = klp.enable_lora_plus(model, rank=2)
        >>> path = os.path.join(tempfile.mkdtemp(), "a.weights.h5")
        >>> model.save_weights(path)
        >>> try:
        ...     klp.load_weights(make(), path)
        ... except ValueError as error:
        ...     print(str(error).split("first: ")[1])
        `keras_loraplus.enable_lora_plus(model, rank=2, targets=['a'])`.

    Source: the format of `keras.Model.save_weights`, Keras 3.
    """
    path = os.fspath(filepath)
    if not path.endswith(".weights.h5"):
        raise ValueError(
            f"`load_weights` expects a file whose name ends in '.weights.h5'. Received: '{path}'. "
            "Adapter files are loaded by `keras_loraplus.load_adapter`, `.keras` files by "
            "`keras.models.load_model`."
        )
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no weights file '{path}'.")
    saved = _saved_adapters(path)
    waiting = early_state.of(model)
    try:
        assigned, error = _try(model, path)
    finally:
        early_state.put_back(waiting)
    of_adapters = _adapter_faults(model, saved, assigned)
    reasons = of_adapters + (_missing(model, assigned) if error is None else [str(error)])
    if reasons:
        raise ValueError(
            f"'{path}' does not fit the model '{model.name}'; nothing was loaded: "
            + "; ".join(reasons)
            + (_hint(model, saved) if of_adapters and saved else "")
        ) from error
    model.load_weights(path)
    return model


def _try(model, path):
    """Returns the ids of the variables that loading assigns, and the error that it raises."""
    optimizer = getattr(model, "optimizer", None)
    state = _optimizer_state(path)
    error = None
    with _DryRun() as scope, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading itself will say them
        try:
            # Apart, because Keras makes an optimizer to learn which attributes one has (3.15.1),
            # and variables cannot be made here.
            model.load_weights(path, objects_to_skip=[optimizer])
            if optimizer is not None:
                optimizer.load_own_variables(state)
        except Exception as caught:  # a layer's own loading may fail in any way
            error = caught
    return scope.assigned, error


def _optimizer_state(path):
    import h5py  # comes with Keras

    with h5py.File(path, "r") as file:
        group = file.get("optimizer/vars", {})
        return {key: np.array(group[key]) for key in group}


def _adapter_faults(model, saved, assigned):
    layers = _adapted(model)
    loaded = [la for la in layers if all(id(v) in assigned for v in _factors(la))]
    faults = []
    if len(saved) > len(loaded):
        faults.append(f"it holds adapters of {len(saved)} layers, of which {len(loaded)} fit")
    if saved and len(loaded) < len(layers):
        fitting = {id(layer) for layer in loaded}
        left = [layer.path or layer.name for layer in layers if id(layer) not in fitting]
        faults.append(f"it holds no adapters that fit {left}")
    return faults


def _missing(model, assigned):
    of_adapters = {id(v) for la in _adapted(model) for v in (*_factors(la), la.lora_scaling)}
    missing = [v.path for v in model.weights if id(v) not in assigned | of_adapters]
    more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
    return [f"it holds nothing that fits {missing[:10]}{more}"] if missing else []


def _adapted(model):
    return [layer for layer in _compat.flatten_layers(model) if is_adapted(layer)]


def _factors(layer):
    return list(layer.adapter_variables().values())


def _hint(model, saved):
    """Returns what to do, from the adapters that the file holds."""
    layers = _adapted(model)
    shown = [f"'{a.name}' ({a.path}, rank {a.rank})" for a in saved[:10]]
    more = f" and {len(saved) - 10} more" if len(saved) > 10 else ""
    has = f"The file has adapters on {', '.join(shown)}{more}; the model has "
    has += f"{len(layers)}." if layers else "none."
    targets = sorted({adapter.name for adapter in saved})
    ranks = {adapter.name: adapter.rank for adapter in saved}
    alphas = {a.name: round(a.scale * a.rank, 6) for a in saved if abs(a.scale - 1) > 1e-6}
    settings = [f"rank={saved[0].rank}"]
    if len(set(ranks.values())) > 1:
        settings.append(f"rank_pattern={ranks}")
    if alphas:
        same = len(set(alphas.values())) == 1 and set(alphas) == set(targets)
        settings.append(f"alpha={alphas[targets[0]]}" if same else f"alpha_pattern={alphas}")
    settings.append(f"targets={targets}")
    advice = "Enable a fresh model as the saved one was" if layers else "Enable them first"
    return f". {has} {advice}: `keras_loraplus.enable_lora_plus(model, {', '.join(settings)})`."


def _saved_adapters(path):
    """Returns the adapters in a weights file, without a model."""
    import h5py  # comes with Keras

    found = []

    def visit(name, group):
        if not isinstance(group, h5py.Group) or "lora_scaling" not in group:
            return
        factor = next((group[key] for key in sorted(group) if key.endswith("_a")), None)
        found.append(
            SavedAdapter(
                path=name.removesuffix("/vars"),
                name=str(group.attrs.get("name", name)),
                rank=0 if factor is None else int(factor.shape[-1]),
                scale=float(group["lora_scaling"][()]),
            )
        )

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except OSError as error:
        raise ValueError(
            f"'{path}' is not a whole weights file: {error}. It may have been cut off while it was "
            "written or copied; save or fetch it again."
        ) from error
    return found
