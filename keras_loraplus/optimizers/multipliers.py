"""Which variable trains at which multiple of the learning rate: names in, a table out.

Nothing here knows a tensor, a variable or a backend, so that every rule can be read and tested as
plain data.
"""

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Last component of a variable's path -> its role. Native Keras LoRA uses the same names. A layer
# with several matrices of its own has the matrix's name in the middle: `lora_kernel_up_proj_a`.
ROLES = {
    "lora_kernel_a": "lora_a",
    "lora_kernel_b": "lora_b",
    "lora_embeddings_a": "embedding_a",
    "lora_embeddings_b": "embedding_b",
}
OTHER = "other"
_NAMED = re.compile(r"(lora_kernel|lora_embeddings)_\w+(_[ab])")

_SHOWN_PATHS = 50


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """What one variable's learning rate is multiplied with, and why.

    Attributes:
        path: The variable's path.
        role: `"lora_a"`, `"lora_b"`, `"embedding_a"`, `"embedding_b"` or `"other"`.
        pattern: The key of `lr_multipliers` that matched the path, or None.
        value: The multiplier.
    """

    path: str
    role: str
    pattern: str | None
    value: float


@dataclasses.dataclass(frozen=True)
class Settings:
    """The three LoRA+ arguments of an optimizer, checked.

    Attributes:
        lr_ratio: Rate of B over the rate of A.
        lr_multipliers: Path or regular expression -> factor.
        embedding_lr_multiplier: Factor on both sides of adapted embeddings.

    Raises:
        ValueError: A number is not positive and finite, or a pattern is not a regular expression.
    """

    lr_ratio: float = 16.0
    lr_multipliers: Mapping[str, float] | None = None
    embedding_lr_multiplier: float = 1.0

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "lr_ratio", check_factor("`lr_ratio`", self.lr_ratio))
        set_field(
            self,
            "embedding_lr_multiplier",
            check_factor("`embedding_lr_multiplier`", self.embedding_lr_multiplier),
        )
        set_field(self, "lr_multipliers", check_patterns(self.lr_multipliers))


def role_of(path: str) -> str:
    """Returns the role of a variable, read off the last component of its path only.

    Args:
        path: The variable's path.

    Returns:
        A value of `ROLES`, or `"other"`.

    Example:
    >>> role_of("encoder/query/lora_kernel_b"), role_of("lora_kernel_b_head/kernel")
    ('lora_b', 'other')
    """
    name = path.rsplit("/", 1)[-1]
    named = _NAMED.fullmatch(name)
    return ROLES.get("".join(named.groups()) if named else name, OTHER)


def check_factor(name: str, value: object) -> float:
    """Returns a learning-rate factor as a float.

    Args:
        name: What the value is, for the error.
        value: The value to check.

    Raises:
        ValueError: The value is not a positive, finite number.
    """
    valid = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not valid or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise ValueError(
            f"{name} must be a positive, finite number. Received: {value!r} (of type "
            f"{type(value).__name__}). To keep a variable from training, set "
            "`layer.trainable = False` before compiling."
        )
    return float(value)  # type: ignore[arg-type]


def check_patterns(patterns: Mapping[str, float] | None) -> dict[str, float]:
    """Returns `lr_multipliers` as a plain dictionary.

    Args:
        patterns: Variable path or regular expression -> factor, or None.

    Raises:
        ValueError: Not a mapping, a key that is no regular expression, or a bad factor.
    """
    if patterns is None:
        return {}
    if not isinstance(patterns, Mapping):
        raise ValueError(
            "`lr_multipliers` must be a dictionary of variable path or regular expression -> "
            f"factor, for example {{'logits/.*': 8.0}}. Received: {patterns!r}"
        )
    checked = {}
    for pattern, factor in patterns.items():
        if not isinstance(pattern, str):
            raise ValueError(
                "The keys of `lr_multipliers` must be strings (a variable path or a regular "
                f"expression). Received: {pattern!r} (of type {type(pattern).__name__})"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"The key {pattern!r} of `lr_multipliers` is not a regular expression: {error}. "
                "Use `re.escape` for a path that contains special characters."
            ) from error
        checked[pattern] = check_factor(f"`lr_multipliers[{pattern!r}]`", factor)
    return checked


def plan_multipliers(paths: Sequence[str], settings: Settings) -> list[Multiplier]:
    """Assigns every variable its learning-rate multiplier.

    The multiplier is the role's (1 for A and for ordinary variables, `lr_ratio` for B, both times
    `embedding_lr_multiplier` for embeddings), times the factor of the pattern that matches the
    path. A pattern that equals the path takes the variable; only where there is none are the
    patterns tried with `re.fullmatch`.

    Args:
        paths: Paths of the trainable variables, in order.
        settings: The optimizer's LoRA+ arguments.

    Returns:
        One `Multiplier` a path, in the same order.

    Raises:
        ValueError: Two patterns match one variable, or a pattern matches none.

    Example:
    >>> table = plan_multipliers(["d/lora_kernel_a", "d/lora_kernel_b"], Settings(lr_ratio=4))
    >>> [row.value for row in table]
    [1.0, 4.0]
    """
    patterns = settings.lr_multipliers or {}
    table = []
    used = set()
    for path in paths:
        matches = [pattern for pattern in patterns if re.fullmatch(pattern, path)]
        used.update(matches)
        if path in patterns:
            used.add(path)
            matches = [path]
        if len(matches) > 1:
            raise ValueError(
                "Each variable may be matched by one key of `lr_multipliers` only. The variable "
                f"{path!r} is matched by {matches}. Narrow the patterns, or use the "
                "variable's exact path as a key: an exact path takes precedence."
            )
        table.append(_multiplier(path, matches[0] if matches else None, settings))
    unused = [pattern for pattern in patterns if pattern not in used]
    if unused:
        raise ValueError(
            f"Every key of `lr_multipliers` must match a trainable variable. Keys that match none: "
            f"{unused}; paths of the trainable variables: {shorten(paths)}. A pattern has to match "
            "the whole path (`re.fullmatch`)."
        )
    return table


def plan_from_record(
    record: Sequence[Mapping[str, Any]] | None,
    paths: Sequence[str],
    shapes: Sequence[Sequence[int]],
    settings: Settings,
) -> list[Multiplier] | None:
    """Assigns multipliers as they were when the optimizer was saved, by position.

    Keras renames variables when it loads a model (`sequential/head/kernel` becomes `head/kernel`),
    so that a pattern may miss what it matched. Their order is kept; Keras restores moments by it.

    Args:
        record: Rows with `path`, `shape` and `pattern`, from the saved config, or None.
        paths: Paths of the trainable variables, in order.
        shapes: Their shapes.
        settings: The optimizer's LoRA+ arguments.

    Returns:
        One `Multiplier` a path, or None if the variables are not those of the record: another
        number, shape or last path component.
    """
    if record is None or len(record) != len(paths):
        return None
    table = []
    for row, path, shape in zip(record, paths, shapes, strict=True):
        same_name = row["path"].rsplit("/", 1)[-1] == path.rsplit("/", 1)[-1]
        if not same_name or list(row["shape"]) != list(shape):
            return None
        table.append(_multiplier(path, row["pattern"], settings))
    return table


def _multiplier(path: str, pattern: str | None, settings: Settings) -> Multiplier:
    role = role_of(path)
    value = {
        "lora_b": settings.lr_ratio,
        "embedding_a": settings.embedding_lr_multiplier,
        "embedding_b": settings.lr_ratio * settings.embedding_lr_multiplier,
    }.get(role, 1.0)
    if pattern is not None:
        value *= (settings.lr_multipliers or {})[pattern]
    return Multiplier(path, role, pattern, value)


def shorten(paths: Sequence[str]) -> str:
    """Returns paths as text for an error message, without flooding it."""
    shown = ", ".join(repr(path) for path in paths[:_SHOWN_PATHS])
    rest = len(paths) - _SHOWN_PATHS
    return f"[{shown}{f', and {rest} more' if rest > 0 else ''}]"
