"""What an adapter is: rank, strength, initialisers and dropout, checked once."""

import dataclasses
import math
import numbers
from typing import Any

import keras

INITS = ("loraplus", "lora")
SCALINGS = ("standard", "rslora")


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """The settings of one low-rank adapter.

    The adapter adds `s (x A) B` to a layer's product `x W`, with

        s = alpha / rank           for scaling="standard"
        s = alpha / sqrt(rank)     for scaling="rslora"   (arXiv 2312.03732)

    Args:
        rank: Positive integer r, the inner width of A (n, r) and B (r, m).
        alpha: Positive number, the strength; `None` means `rank`, so that the
            standard scaling is 1.
        init: `"loraplus"` (A zero, B uniform), `"lora"` (A uniform, B zero), or a
            pair `(a_initializer, b_initializer)` of Keras initializers of which
            exactly one is zeros.
        scaling: `"standard"` or `"rslora"`.
        dropout: Float in [0, 1), the rate at which the adapter's input is dropped
            while training.
        max_rank: Integer of at least `rank`, up to which A and B have room, filled with zeros, so
            that adapters of other ranks can take their place; `None` means `rank`.

    Raises:
        ValueError: If any argument is out of its range; nothing else is touched.

    Example:
        >>> AdapterSpec(rank=8, alpha=16).scale
        2.0

    Source: Hu et al., arXiv 2106.09685; Hayou et al., arXiv 2402.12354.
    """

    rank: int
    alpha: float | None = None
    init: Any = "loraplus"
    scaling: str = "standard"
    dropout: float = 0.0
    max_rank: int | None = None

    def __post_init__(self):
        """Checks every setting and fills in what has a default."""
        object.__setattr__(self, "rank", _checked_rank(self.rank))
        alpha = self.rank if self.alpha is None else self.alpha
        object.__setattr__(self, "alpha", _checked_alpha(alpha))
        object.__setattr__(self, "init", _checked_init(self.init))
        if self.scaling not in SCALINGS:
            raise ValueError(
                f"`scaling` must be one of {list(SCALINGS)}. Received: scaling={self.scaling!r}."
            )
        object.__setattr__(self, "dropout", _checked_dropout(self.dropout))
        if self.max_rank is not None:
            object.__setattr__(self, "max_rank", _checked_max_rank(self.max_rank, self.rank))

    @property
    def width(self):
        """The inner width of the variables of A and B: `max_rank`, or the rank."""
        return self.rank if self.max_rank is None else self.max_rank

    @property
    def scale(self):
        """The factor s on the product A B, a Python float."""
        assert self.alpha is not None  # filled in by __post_init__
        divisor = self.rank if self.scaling == "standard" else math.sqrt(self.rank)
        return float(self.alpha / divisor)

    def get_config(self):
        """Returns the settings as plain JSON values."""
        init = self.init
        if not isinstance(init, str):
            init = [keras.initializers.serialize(part) for part in init]
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "init": init,
            "scaling": self.scaling,
            "dropout": self.dropout,
            "max_rank": self.max_rank,
        }

    def own_config(self):
        """Returns the settings of the adapter itself, without the room that its model has."""
        config = self.get_config()
        del config["max_rank"]
        return config

    @classmethod
    def from_config(cls, config):
        """Rebuilds the settings that `get_config` returned."""
        return cls(**config)


def _checked_rank(rank):
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        raise ValueError(
            "`rank` must be a positive integer, for example 8. "
            f"Received: rank={rank!r} (of type {type(rank).__name__})."
        )
    return int(rank)


def _checked_max_rank(max_rank, rank):
    whole = isinstance(max_rank, numbers.Integral) and not isinstance(max_rank, bool)
    if not whole or max_rank < rank:
        raise ValueError(
            f"`max_rank` must be None or an integer of at least the rank, {rank}. "
            f"Received: max_rank={max_rank!r} (of type {type(max_rank).__name__})."
        )
    return int(max_rank)


def _is_real(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _checked_alpha(alpha):
    if not _is_real(alpha) or not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(
            "`alpha` must be a positive finite number, or None for alpha = rank. "
            f"Received: alpha={alpha!r} (of type {type(alpha).__name__})."
        )
    return int(alpha) if isinstance(alpha, numbers.Integral) else float(alpha)


def _checked_dropout(dropout):
    if not _is_real(dropout) or not 0 <= dropout < 1:
        raise ValueError(
            "`dropout` must be a number from 0 (none) up to but not including 1. "
            f"Received: dropout={dropout!r} (of type {type(dropout).__name__})."
        )
    return float(dropout)


def _checked_init(init):
    if isinstance(init, str):
        if init in INITS:
            return init
    elif isinstance(init, (tuple, list)) and len(init) == 2:
        pair = tuple(_as_initializer(part, init) for part in init)
        zeros = [isinstance(part, keras.initializers.Zeros) for part in pair]
        if sum(zeros) != 1:
            problem = (
                "neither is zeros, so that enabling would change the model's outputs"
                if not any(zeros)
                else "both are zeros, so that neither could ever receive a gradient"
            )
            raise ValueError(
                "A pair of initializers for (A, B) must have exactly one "
                f'`keras.initializers.Zeros`; {problem}. Received: init={init!r}. Use "loraplus" '
                '(A zero, B random), "lora" (A random, B zero), or a pair such as '
                '("zeros", keras.initializers.RandomNormal(stddev=0.3)).'
            )
        return pair
    raise ValueError(
        f"`init` must be one of {list(INITS)} or a pair (a_initializer, b_initializer) of "
        f"Keras initializers. Received: init={init!r}."
    )


def _as_initializer(part, init):
    try:
        found = keras.initializers.get(part)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"Each entry of the pair `init` must be a Keras initializer. Received: init={init!r}: "
            f"{error}"
        ) from error
    if found is None:
        raise ValueError(
            f"Each entry of the pair `init` must be a Keras initializer. Received: init={init!r}."
        )
    return found
