"""The arguments of a sweep, checked before anything is trained."""

import dataclasses
import json
from typing import Any

import keras

from keras_loraplus.tuning.cells import Axes, plan_axes
from keras_loraplus.tuning.trial import Plan, count_rows, is_arrays


@dataclasses.dataclass
class Spec:
    """A checked sweep; `spec[name]` is the argument of that name as it was given.

    Attributes:
        plan: How each cell is trained and measured.
        arms: The axes of every arm.
        seeds: Seeds of every cell.
        mode: `"max"` or `"min"`.
        setup: How cells are trained, as JSON.
        arguments: The arguments of `sweep`.
    """

    plan: Plan
    arms: list[Axes]
    seeds: list[int]
    mode: str
    setup: dict[str, Any]
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def direction(self) -> str:
        """What Optuna calls the mode."""
        return "maximize" if self.mode == "max" else "minimize"


def check(given: dict[str, Any]) -> Spec:
    """Returns the sweep that arguments ask for.

    Args:
        given: The arguments of `sweep` by name.

    Raises:
        ValueError: If one of them is not as `sweep` says.
    """
    rates = ("eta_a", "eta_b", "lr_ratio", "head_rate", "head_ratio", "lora", "full")
    arms = plan_axes(**{name: given[name] for name in rates})
    seeds = list(given["seeds"])
    if not seeds or len(set(seeds)) < len(seeds) or not all(_is_int(seed, 0) for seed in seeds):
        raise ValueError(f"`seeds` must be different whole numbers >= 0. Received: {seeds!r}")
    for name, least in (("epochs", 1), ("n_workers", 1), ("heartbeat", 1), ("max_deaths", 0)):
        if not _is_int(given[name], least):
            raise ValueError(f"`{name}` must be a whole number >= {least}. Got: {given[name]!r}")
    for name in ("batch_size", "evaluate_every", "n_trials"):
        if given[name] is not None and not _is_int(given[name], 1):
            raise ValueError(f"`{name}` must be None or a positive integer. Got: {given[name]!r}")
    if not callable(given["build"]):
        raise ValueError(f"`build` must be a function of a Cell. Received: {given['build']!r}")
    sampled = [axes.arm for axes in arms if not axes.is_grid()]
    if (given["sampler"] is None) != (given["n_trials"] is None):
        raise ValueError("`sampler` and `n_trials` go together: one needs the other.")
    if sampled and given["sampler"] is None:
        raise ValueError(f"Axes that are distributions need a `sampler` (arms: {sampled}).")
    own_training = callable(given["train"])
    if not own_training and (given["validation"] is None or given["loss"] is None):
        raise ValueError(
            "With training data, `validation` and `loss` are needed. Without them, `train` must be "
            "a function of (model, cell, report)."
        )
    if given["evaluate_every"] is not None and not is_arrays(given["train"]):
        raise ValueError("`evaluate_every` needs training data that are arrays (x, y).")
    schedule = given["schedule"]
    if not callable(schedule) and schedule not in ("constant", "linear"):
        raise ValueError(
            f"`schedule` must be 'constant', 'linear' or a function. Received: {schedule!r}"
        )
    mode = given["mode"] or _mode_of(given["monitor"])
    if mode not in ("max", "min"):
        raise ValueError(f"`mode` must be 'max', 'min' or None. Received: {mode!r}")
    names = ("build", "train", "validation", "monitor", "loss", "metrics", "epochs", "batch_size")
    plan = Plan(
        **{name: given[name] for name in (*names, "evaluate_every", "schedule", "head")},
        optimizer_options=given["optimizer_options"] or {},
    )
    return Spec(plan, arms, seeds, mode, _setup(given, mode), given)


def _setup(given: dict[str, Any], mode: str) -> dict[str, Any]:
    """Returns how cells are trained, as JSON, to be written down and compared on resuming."""
    shown: dict[str, Any] = {"monitor": given["monitor"], "mode": mode}
    if callable(given["train"]):
        shown["train"] = getattr(given["train"], "__qualname__", "a function")
    else:
        options = given["optimizer_options"] or {}
        shown |= {name: given[name] for name in ("epochs", "batch_size", "evaluate_every")}
        schedule = given["schedule"]
        shown["schedule"] = getattr(schedule, "__qualname__", schedule)
        shown["optimizer_options"] = {key: str(value) for key, value in options.items()}
        for part in ("train", "validation"):
            if is_arrays(given[part]):
                shown[f"{part}_rows"] = count_rows(given[part])
    for part in ("sampler", "pruner"):
        if given[part] is not None:
            shown[part] = type(given[part]).__name__
    shown["backend"] = keras.backend.backend()
    return {**shown, "about": json.loads(json.dumps(dict(given["about"] or {})))}


def _mode_of(monitor: str) -> str:
    if any(part in monitor for part in ("loss", "error", "perplexity")):
        return "min"
    if any(part in monitor for part in ("acc", "auc", "f1", "match", "matthews", "precision")):
        return "max"
    raise ValueError(f"Whether more of {monitor!r} is better is not known: give `mode`.")


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
