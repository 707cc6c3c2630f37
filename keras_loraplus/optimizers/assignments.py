"""The table of what trains at which learning rate."""

import dataclasses
from typing import Any

from keras_loraplus import _compat


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One variable and its learning rate.

    Attributes:
        path: The variable's path.
        role: `"lora_a"`, `"lora_b"`, `"embedding_a"`, `"embedding_b"` or `"other"`.
        shape: The variable's shape.
        multiplier: What the optimizer's learning rate is multiplied with.
        learning_rate: The variable's rate now, schedules included.
        pattern: The key of `lr_multipliers` that matched, or None.
    """

    path: str
    role: str
    shape: tuple[int, ...]
    multiplier: float
    learning_rate: float
    pattern: str | None = None


class Assignments(list):
    """A list of `Assignment` that prints as a table."""

    def __str__(self) -> str:
        header = ("variable", "role", "shape", "multiplier", "learning rate")
        rows = [
            (
                row.path,
                row.role if row.pattern is None else f"{row.role} ({row.pattern})",
                str(row.shape),
                f"{row.multiplier:g}",
                f"{row.learning_rate:.4g}",
            )
            for row in self
        ]
        widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
        lines = []
        for line in [header, tuple("-" * width for width in widths), *rows]:
            texts = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3], strict=True)]
            numbers = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
            lines.append("  ".join([*texts, *numbers]).rstrip())
        return "\n".join(lines)


def assignments(model: Any) -> Assignments:
    """Tells at which rate a compiled model's variables train.

    Works before the first `fit` as well: what will be trained is then read off the model.

    Args:
        model: A compiled `keras.Model` whose optimizer is a LoRA+ one, by itself or inside a
            `keras.optimizers.LossScaleOptimizer`.

    Returns:
        A list of records with `path`, `role`, `shape`, `multiplier`, `learning_rate` and
        `pattern`, one a trainable variable; printing it gives a table.

    Raises:
        ValueError: The model is not compiled, not built, or uses another optimizer.

    Example:
    >>> import keras, keras_loraplus as klp
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> model.compile(klp.LoRAPlusAdamW(1e-3, lr_multipliers={".*head/.*": 8.0}), loss="mse")
    >>> [row.multiplier for row in klp.assignments(model)]
    [8.0, 8.0]
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise ValueError(
            "Expected a compiled model. Received a model without an optimizer; call "
            "`model.compile(keras_loraplus.LoRAPlusAdamW(...), ...)` first."
        )
    optimizer = _compat.innermost_optimizer(optimizer)
    if not hasattr(optimizer, "assignments"):
        raise ValueError(
            "Expected a model compiled with `keras_loraplus.LoRAPlusAdamW` or an optimizer made by "
            f"`keras_loraplus.loraplus`. Received: {type(optimizer).__name__}"
        )
    if not model.built:
        raise ValueError(
            f"Expected a built model. Received: {model.name!r}, which has no variables yet; call "
            "it on a batch or `model.build(input_shape)` first."
        )
    return optimizer.assignments(model.trainable_variables)
