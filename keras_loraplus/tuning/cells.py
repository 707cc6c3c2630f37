"""What a sweep tries: axes in, cells out. Pure data, but for `Cell.optimizer`."""

import dataclasses
import itertools
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras_loraplus.optimizers.adamw import LoRAPlusAdamW
from keras_loraplus.optimizers.mixin import path_of
from keras_loraplus.optimizers.multipliers import OTHER, role_of

ARMS = ("loraplus", "lora", "full")
_GRID_NAMES = ("eta_a", "eta_b", "lr_ratio", "head_rate", "head_ratio")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting of a sweep, and the seed it is tried with.

    Attributes:
        arm: `"loraplus"`, `"lora"` (one rate for A and B) or `"full"` (no adapters).
        eta_a: Rate of A; in the arm `"full"` the rate of everything but the head.
        eta_b: Rate of B; None in the arm `"full"`.
        head_rate: Rate of the head, or None if the sweep was told that there is none.
        seed: Random seed, set before the model is built.
    """

    arm: str
    eta_a: float
    eta_b: float | None
    head_rate: float | None
    seed: int

    @property
    def lr_ratio(self) -> float:
        """Rate of B over the rate of A; 1 in the arm `"full"`."""
        return 1.0 if self.eta_b is None else self.eta_b / self.eta_a

    @property
    def rates(self) -> tuple:
        """The cell without its seed: `(eta_a, eta_b, head_rate)`."""
        return self.eta_a, self.eta_b, self.head_rate

    def as_dict(self) -> dict[str, Any]:
        """Returns the attributes and `lr_ratio`."""
        record = dataclasses.asdict(self)
        seed = record.pop("seed")
        return {**record, "lr_ratio": self.lr_ratio, "seed": seed}

    def optimizer(
        self,
        model: Any,
        *,
        schedule: Callable | None = None,
        head: str | Sequence[str] | None = None,
        **options: Any,
    ) -> LoRAPlusAdamW:
        """Returns a `LoRAPlusAdamW` with this cell's rates.

        Args:
            model: The built model, adapted unless the arm is `"full"`.
            schedule: Function of a rate that returns what to give as `learning_rate`, for example
                a `keras.optimizers.schedules.LearningRateSchedule` that starts there. None: the
                rate itself.
            head: Regular expressions on the paths of the variables that train at `head_rate`
                (`re.fullmatch`). None: with adapters, all trainable variables that are no A or B;
                in the arm `"full"`, those outside of `model.backbone`.
            **options: Further arguments of `LoRAPlusAdamW`.

        Raises:
            ValueError: If there is a head and `head_rate` is None, or the other way round.

        Example:
            >>> dense = keras.layers.Dense
            >>> model = keras.Sequential([keras.Input((4,)), dense(8), dense(2, name="top")])
            >>> report = klp.enable_lora_plus(model, rank=2)
            >>> cell = klp.tuning.Cell("loraplus", 1e-3, 8e-3, 2e-3, seed=0)
            >>> optimizer = cell.optimizer(model, weight_decay=0.0)
            >>> optimizer.build(model.trainable_variables)
            >>> [(row.role, round(row.learning_rate, 6)) for row in optimizer.assignments()][1:3]
            [('lora_b', 0.008), ('other', 0.002)]
        """
        paths = self._head_paths(model, head)
        if self.arm != "full" and self.head_rate is None and paths:
            raise ValueError(
                "The sweep was given no `head_rate` and no `head_ratio`, which says that only A "
                f"and B train. These variables train as well: {paths}. Give their rate."
            )
        if self.head_rate is not None and not paths:
            raise ValueError(
                f"The cell has a head rate of {self.head_rate:g}, and no trainable variable of the "
                f"model is a head's by `head`={head!r}. Name it by a regular expression on "
                "variable paths, or sweep without `head_rate` and `head_ratio`."
            )
        multipliers = {}
        if self.head_rate is not None:
            multipliers = {re.escape(path): self.head_rate / self.eta_a for path in paths}
        return LoRAPlusAdamW(
            self.eta_a if schedule is None else schedule(self.eta_a),
            lr_ratio=self.lr_ratio,
            lr_multipliers=multipliers,
            **options,
        )

    def _head_paths(self, model: Any, head: str | Sequence[str] | None) -> list[str]:
        trainable = {path_of(v): v for v in model.trainable_variables}
        if head is not None:
            patterns = [head] if isinstance(head, str) else list(head)
            return [p for p in trainable if any(re.fullmatch(pattern, p) for pattern in patterns)]
        if self.arm != "full":
            return [path for path in trainable if role_of(path) == OTHER]
        if not hasattr(model, "backbone"):
            return []
        backbone = {id(variable) for variable in model.backbone.variables}
        return [path for path, variable in trainable.items() if id(variable) not in backbone]


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one arm: lists of rates, or Optuna distributions where a sampler chooses.

    Exactly one of `eta_b` and `lr_ratio` is set in the arm `"loraplus"`, neither in the others; at
    most one of `head_rate` and `head_ratio` (the head's rate over `eta_a`).
    """

    arm: str
    eta_a: Any
    eta_b: Any = None
    lr_ratio: Any = None
    head_rate: Any = None
    head_ratio: Any = None

    def items(self) -> list[tuple[str, Any]]:
        """Returns the axes that are set, by name."""
        named = [(name, getattr(self, name)) for name in _GRID_NAMES]
        return [(name, values) for name, values in named if values is not None]

    def cell(self, point: Mapping[str, float], seed: int) -> Cell:
        """Returns the cell at a point of the axes."""
        eta_a = float(point["eta_a"])
        eta_b: float | None = eta_a
        if self.arm == "full":
            eta_b = None
        elif "eta_b" in point:
            eta_b = float(point["eta_b"])
        elif "lr_ratio" in point:
            eta_b = eta_a * float(point["lr_ratio"])
        head = point.get("head_rate")
        if "head_ratio" in point:
            head = eta_a * float(point["head_ratio"])
        return Cell(self.arm, eta_a, eta_b, None if head is None else float(head), seed)

    def is_grid(self) -> bool:
        """Whether every axis is a list."""
        return all(isinstance(values, list) for _, values in self.items())

    def points(self) -> list[dict[str, float]]:
        """Returns every point of the grid."""
        names = [name for name, _ in self.items()]
        lists = [values for _, values in self.items()]
        return [dict(zip(names, point, strict=True)) for point in itertools.product(*lists)]

    def as_dict(self) -> dict[str, Any]:
        """Returns the axes as JSON can hold them."""
        return {n: v if isinstance(v, list) else str(v) for n, v in self.items()}


def plan_axes(
    eta_a: Any,
    eta_b: Any,
    lr_ratio: Any,
    head_rate: Any,
    head_ratio: Any,
    lora: Any,
    full: Mapping[str, Any] | None,
) -> list[Axes]:
    """Returns the checked axes of every arm; the arguments are those of `sweep`.

    Raises:
        ValueError: If an axis is missing, given twice or not of positive numbers, or plain LoRA
            gets another number of cells than LoRA+.
    """
    if (eta_b is None) == (lr_ratio is None):
        raise ValueError(
            "Give B's rates either as `eta_b` (rates) or as `lr_ratio` (over `eta_a`). Received: "
            f"eta_b={eta_b!r}, lr_ratio={lr_ratio!r}"
        )
    plus = _axes("loraplus", eta_a, eta_b, lr_ratio, head_rate, head_ratio)
    planned = [plus]
    head = {"head_rate": head_rate, "head_ratio": head_ratio}
    if lora is True:
        planned.append(_axes("lora", _lora_rates(plus), None, None, **head))
    elif lora:
        planned.append(_from_mapping("lora", lora, head))
    elif lora is not False and lora is not None:
        raise ValueError(f"`lora` must be True, False or a dictionary of axes. Received: {lora!r}")
    if full is not None:
        planned.append(_from_mapping("full", full, head))
    counts = {axes.arm: len(axes.points()) for axes in planned if axes.is_grid()}
    if "lora" in counts and counts["lora"] != counts.get("loraplus", counts["lora"]):
        raise ValueError(
            "Plain LoRA is tuned with as many cells as LoRA+, or the comparison says nothing: "
            f"`lora` has {counts['lora']} and LoRA+ {counts['loraplus']}. Give as many rates in "
            "`lora['eta_a']`, or lora=True, which chooses them."
        )
    return planned


def _from_mapping(arm: str, given: Mapping[str, Any], head: Mapping[str, Any]) -> Axes:
    allowed = {"eta_a", "head_rate", "head_ratio"}
    if not isinstance(given, Mapping) or "eta_a" not in given or set(given) - allowed:
        raise ValueError(
            f"`{arm}` must be a dictionary with 'eta_a' (its rates) and at most one of 'head_rate' "
            f"and 'head_ratio' (default: those of LoRA+). Received: {given!r}"
        )
    own = {name: given.get(name) for name in ("head_rate", "head_ratio")}
    if own["head_rate"] is None and own["head_ratio"] is None:
        own = dict(head)
    return _axes(arm, given["eta_a"], None, None, **own)


def _axes(arm: str, eta_a: Any, eta_b: Any, lr_ratio: Any, head_rate: Any, head_ratio: Any) -> Axes:
    if head_rate is not None and head_ratio is not None:
        raise ValueError(
            "Give the head's rate either as `head_rate` or as `head_ratio` (over `eta_a`). "
            f"Received: head_rate={head_rate!r}, head_ratio={head_ratio!r}"
        )
    given = dict(zip(_GRID_NAMES, (eta_a, eta_b, lr_ratio, head_rate, head_ratio), strict=True))
    return Axes(arm, **{name: _axis(name, values) for name, values in given.items()})


def _axis(name: str, values: Any) -> Any:
    if values is None or hasattr(values, "single"):  # an Optuna distribution
        return values
    numbers_given = isinstance(values, numbers.Real) and not isinstance(values, bool)
    listed = [values] if numbers_given else list(values) if _is_sequence(values) else []
    valid = [
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and float(value) > 0
        for value in listed
    ]
    if not listed or not all(valid) or len(set(listed)) < len(listed):
        raise ValueError(
            f"`{name}` must be a positive number, a list of different ones, or an Optuna "
            f"distribution. Received: {values!r}"
        )
    return [float(value) for value in listed]


def _is_sequence(values: Any) -> bool:
    return hasattr(values, "__iter__") and not isinstance(values, (str, bytes, Mapping))


def _lora_rates(plus: Axes) -> Any:
    """Returns rates for plain LoRA: as many as LoRA+ has pairs, over the range of both its axes."""
    low, high = _bounds(plus.eta_a)
    if plus.eta_b is not None:
        other = _bounds(plus.eta_b)
    else:
        least, most = _bounds(plus.lr_ratio)
        other = low * least, high * most
    low, high = min(low, other[0]), max(high, other[1])
    if not plus.is_grid():
        from optuna.distributions import FloatDistribution

        return FloatDistribution(low, high, log=True)
    count = len(plus.eta_a) * len(plus.eta_b or plus.lr_ratio)
    if count == 1 or low == high:
        return [math.sqrt(low * high)]
    step = (high / low) ** (1 / (count - 1))
    # Rounded, so that the rates can be read and typed; all of them stay different.
    return [float(f"{low * step**index:.6g}") for index in range(count)]


def _bounds(axis: Any) -> tuple[float, float]:
    if isinstance(axis, list):
        return min(axis), max(axis)
    return float(axis.low), float(axis.high)
