"""Where to start: rates and a ratio from what is known, and how well it is known."""

import dataclasses
import math
import numbers
from typing import Any

from keras_loraplus.optimizers.adamw import LoRAPlusAdamW
from keras_loraplus.optimizers.mixin import path_of
from keras_loraplus.optimizers.multipliers import OTHER, role_of
from keras_loraplus.tuning.cells import Cell
from keras_loraplus.tuning.result import SweepResult

# Of one seed there is no spread to hold a difference against; `plot_heatmap` takes cells within the
# same share of the best for equally good.
_ONE_SEED = 0.01
_INITS = ("loraplus", "lora")


@dataclasses.dataclass(frozen=True)
class _Figure:
    """Ratios that were published: the range, and where in it to start."""

    low: int
    high: int
    first: int
    text: str


# The figures of the paper (2402.12354). Where it gives a range and no first choice, the start is
# the end nearer to plain LoRA, which is known to work; on hard tasks the other end.
_FIGURES = {
    (None, "loraplus"): _Figure(
        8, 32, 16, "The paper advises ratios of 8 to 32, 16 first, with A zero and B random"
    ),
    ("roberta", "loraplus"): _Figure(
        8, 32, 16, "RoBERTa in the paper: best at about 16 with A zero and B random"
    ),
    ("roberta", "lora"): _Figure(
        4, 8, 4, "RoBERTa in the paper: best at 4 to 8 with A random and B zero"
    ),
    ("llama", None): _Figure(
        2, 4, 2, "Llama-7b in the paper: best at 2 to 4, smaller than RoBERTa's"
    ),
}


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Learning rates to start from; `print` shows them with their evidence.

    Attributes:
        eta_a: Rate of A, the `learning_rate` of `LoRAPlusAdamW`.
        lr_ratio: Rate of B over the rate of A.
        init: `init` of `enable_lora_plus`; None for the one of the sweep, which did not record it.
        head_rate: Rate of a new head; None if the sweep had none.
        evidence: What the suggestion rests on, a line each.
        caution: When not to expect a gain.
        lora_as_good: Whether tuned plain LoRA was as good in the sweep; None if that is not known.
    """

    eta_a: float
    lr_ratio: float
    init: str | None
    head_rate: float | None
    evidence: tuple[str, ...]
    caution: str
    lora_as_good: bool | None = None

    @property
    def eta_b(self) -> float:
        """Rate of B."""
        return self.eta_a * self.lr_ratio

    def optimizer(self, model: Any, **options: Any) -> LoRAPlusAdamW:
        """Returns a `LoRAPlusAdamW` with these rates, the head's included.

        Args:
            model: The built and adapted model. If A and B are all that trains, there is no head,
                and its rate is not used.
            **options: Arguments of `Cell.optimizer`: `schedule`, `head`, and those of
                `LoRAPlusAdamW`.
        """
        head = self.head_rate
        if all(role_of(path_of(variable)) != OTHER for variable in model.trainable_variables):
            head = None
        cell = Cell("loraplus", self.eta_a, self.eta_b, head, seed=0)
        return cell.optimizer(model, **options)

    def __str__(self) -> str:
        """Returns the rates, the evidence and the caution."""
        init = repr(self.init) if self.init else "as in the sweep, which does not record it"
        head = "none" if self.head_rate is None else f"{self.head_rate:.3g}"
        lines = [
            f"eta_A {self.eta_a:.3g} (learning_rate), ratio {self.lr_ratio:.3g}, "
            f"so eta_B {self.eta_b:.3g}; init: {init}; rate of the head: {head}"
        ]
        return "\n".join([*lines, *(f"- {line}" for line in self.evidence), self.caution])


def suggest(
    result: SweepResult | None = None,
    *,
    lora_rate: float | None = None,
    model_family: str | None = None,
    hard_task: bool | None = None,
    init: str | None = None,
    head_rate: float | None = None,
) -> Suggestion:
    """Suggests where to start: a rate of A, a ratio, an initialisation.

    From a sweep, a short one too, it is the best cell of LoRA+, or of plain LoRA where that was
    better. From a rate `e` that worked for plain LoRA, `eta_B = e` and `eta_A = e / lr_ratio`: what
    plain LoRA liked as its one rate is about where B's belongs. Either is a start, to be tuned.

    Args:
        result: What `sweep` returned.
        lora_rate: The learning rate of A and B that worked for plain LoRA. This or `result`.
        model_family: `"roberta"`, `"llama"`, or None for the general advice. With `lora_rate`.
        hard_task: Whether the task is hard for the pretrained model: True for the higher ratios of
            a published range, False for a ratio of 1. With `lora_rate`.
        init: How A and B start: `"loraplus"` (A zero) or `"lora"` (B zero). None: the `"init"` that
            the sweep was given in `about`; with `lora_rate` `"loraplus"`, or at a ratio of 1
            `"lora"`.
        head_rate: Rate of a new head. None: `lora_rate`, at which plain LoRA trained its head too.

    Returns:
        A `Suggestion`.

    Raises:
        ValueError: If not exactly one of `result` and `lora_rate` is given, an argument is not as
            above, or the sweep has no finished cell of LoRA+ or plain LoRA.

    Example:
        >>> start = klp.tuning.suggest(lora_rate=1.6e-3, model_family="roberta")
        >>> start.eta_a, start.lr_ratio, start.init, start.head_rate
        (0.0001, 16.0, 'loraplus', 0.0016)
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(8), dense(2, name="top")])
        >>> report = klp.enable_lora_plus(model, rank=2, init=start.init)
        >>> model.compile(start.optimizer(model, weight_decay=0.0), loss="mse")

    Source: figures of [LoRA+](https://arxiv.org/abs/2402.12354).
    """
    if (result is None) == (lora_rate is None):
        raise ValueError(
            "Give either the result of a sweep or `lora_rate`, the rate that worked for plain "
            f"LoRA. Received: {result!r}, lora_rate={lora_rate!r}"
        )
    if init is not None and init not in _INITS:
        raise ValueError(f"`init` must be one of {_INITS} or None. Received: {init!r}")
    if hard_task not in (None, True, False):
        raise ValueError(f"`hard_task` must be True, False or None. Received: {hard_task!r}")
    families = sorted({family for family, _ in _FIGURES if family})
    if model_family is not None and model_family not in families:
        raise ValueError(
            f"There are figures for the families {families}; give None for the general advice. "
            f"Received: model_family={model_family!r}"
        )
    for name, rate in (("lora_rate", lora_rate), ("head_rate", head_rate)):
        if rate is not None and not _is_rate(rate):
            raise ValueError(f"`{name}` must be a positive number. Received: {rate!r}")
    if lora_rate is not None:
        return _from_rate(float(lora_rate), model_family, hard_task, init, head_rate)
    if not isinstance(result, SweepResult):
        raise ValueError(
            "Expected what `klp.tuning.sweep` or `klp.tuning.load` returned; a rate goes by name, "
            f"`lora_rate=`. Received: {result!r}"
        )
    unused = {"model_family": model_family, "hard_task": hard_task, "head_rate": head_rate}
    given = [name for name, value in unused.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)}: only with `lora_rate`; a sweep has found out for itself."
        )
    return _from_sweep(result, init)


def _is_rate(rate: Any) -> bool:
    number = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
    return number and math.isfinite(rate) and float(rate) > 0


def _from_rate(
    rate: float, family: str | None, hard: bool | None, init: str | None, head: float | None
) -> Suggestion:
    own_head = "The head keeps that rate too, at which plain LoRA trained it."
    stated = own_head if head is None else "The rate of the head is the one given."
    head = rate if head is None else float(head)
    if hard is False:
        evidence = (
            f"Plain LoRA worked at {rate:.3g}; at a ratio of 1 this is plain LoRA.",
            "On tasks that are easy for the pretrained model the paper finds no gain from a ratio.",
            stated,
        )
        caution = "Expect no gain from LoRA+ here: the task was said to be easy."
        return Suggestion(rate, 1.0, init or "lora", head, evidence, caution)
    init = init or "loraplus"
    figure, note = _figure(family, init)
    # Only a range without a first choice has an end to move to.
    ratio = figure.high if hard and figure.first == figure.low else figure.first
    evidence = (
        f"{figure.text}{note}. Worth trying: {figure.low} to {figure.high}.",
        f"What plain LoRA liked as its one rate, {rate:.3g}, is about where eta_B belongs, so "
        f"eta_A = {rate:.3g} / {ratio}.",
        stated,
    )
    caution = (
        "Do not expect a gain on tasks that are easy for the pretrained model: there a ratio near "
        "1 is as good. Compare with plain LoRA tuned with as many trials."
    )
    return Suggestion(rate / ratio, float(ratio), init, head, evidence, caution)


def _figure(family: str | None, init: str) -> tuple[_Figure, str]:
    """Returns the nearest published figure, and what keeps it from fitting."""
    if (family, init) in _FIGURES:
        return _FIGURES[family, init], ""
    if (family, None) in _FIGURES:
        return _FIGURES[family, None], f"; not known to hold for init={init!r} in particular"
    return _FIGURES["roberta", init], "; of other families there is no figure with that init"


def _from_sweep(result: SweepResult, init: str | None) -> Suggestion:
    recorded = (result.setup.get("about") or {}).get("init")
    if init and recorded and init != recorded:
        raise ValueError(
            f"The sweep was made with init={recorded!r}; its rates do not carry over to "
            f"{init!r}. Leave `init` out, or sweep again."
        )
    init = init or (recorded if recorded in _INITS else None)
    plus, plain = result.selected("loraplus"), result.selected("lora")
    best = min(
        (cell for cell in (plain, plus) if cell is not None),
        # The first of equals: plain LoRA has one knob less.
        key=lambda cell: -cell["mean"] if result.mode == "max" else cell["mean"],
        default=None,
    )
    if best is None:
        raise ValueError(
            "The sweep has no cell of LoRA+ or plain LoRA that was finished with every seed. "
            "Let it go on, or give the rate that worked for plain LoRA as `lora_rate`."
        )
    arm = best["arm"]
    name = "LoRA+" if arm == "loraplus" else "plain LoRA (a ratio of 1)"
    seeds = f"{len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''}"
    evidence = [
        f"The best of the sweep is {name}: {result.monitor} {best['mean']:.4g} on validation data, "
        f"mean of {seeds}, of {len(result.cells(arm))} finished cells."
    ]
    edges = result.on_edge(arm)
    if edges:
        evidence.append(f"It is on the edge of {', '.join(edges)}: look further there.")
    if result.missing:
        evidence.append(f"{result.missing} trials of the sweep are still missing.")
    if best["head_rate"] is not None:
        evidence.append(f"The head trained at {best['head_rate']:.3g} in that cell.")
    share = (result.setup.get("about") or {}).get("most_frequent_class")
    if result.monitor == "accuracy" and share is not None and best["mean"] <= share:
        as_good = None
        caution = (
            f"These rates say nothing yet: the most frequent class alone makes up {share:.4g}. "
            "Train longer, on more texts, or with a higher rate of the head."
        )
    else:
        as_good, caution = _compare(result, plus, plain)
    return Suggestion(
        best["eta_a"], best["lr_ratio"], init, best["head_rate"], tuple(evidence), caution, as_good
    )


def _compare(
    result: SweepResult, plus: dict[str, Any] | None, plain: dict[str, Any] | None
) -> tuple[bool | None, str]:
    """Returns whether tuned plain LoRA is as good, or None, and the sentence that says so."""
    if plus is None or plain is None:
        missing = "plain LoRA" if plain is None else "LoRA+"
        return None, (
            f"Whether LoRA+ gains anything is not known: the sweep has no finished {missing}. "
            "On easy tasks a ratio near 1 is as good."
        )
    gain = plus["mean"] - plain["mean"] if result.mode == "max" else plain["mean"] - plus["mean"]
    if plus["std"] is not None and plain["std"] is not None:
        # Two standard errors of the difference of two means.
        spread = 2 * math.sqrt((plus["std"] ** 2 + plain["std"] ** 2) / len(result.seeds))
        held = f"the seeds' spread allows for {spread:.2g}"
    else:
        spread = _ONE_SEED * abs(plain["mean"])
        held = "with one seed, less than 1 % counts as nothing"
    figures = (
        f"{result.monitor} {plain['mean']:.4g} at a rate of {plain['eta_a']:.3g}, "
        f"LoRA+ {plus['mean']:.4g}; {held}"
    )
    if gain <= spread:
        return True, f"Expect no gain from LoRA+: tuned plain LoRA is as good here ({figures})."
    return False, (
        f"LoRA+ was better than tuned plain LoRA here ({figures}). That holds for this data and "
        "budget; on easier tasks a ratio near 1 is as good."
    )
