"""What `enable_lora_plus` did, as plain data that prints as a table."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class AdaptedLayer:
    """One adapted layer: its path, class, settings and the shapes of its factors."""

    path: str
    layer_class: str
    rank: int
    alpha: float
    shapes: dict


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `enable_lora_plus`; `print(report)` is readable.

    Attributes:
        adapted: Tuple of `AdaptedLayer`.
        skipped: Tuple of pairs (path, reason) of layers that could not be adapted.
        heads: Paths of the layers that produce the outputs, left unadapted and as trainable as
            they were.
        trainable: Paths of all trainable variables.
        trainable_parameters: Number of trainable parameters of the model.
        total_parameters: Number of all parameters of the model.
    """

    adapted: tuple
    skipped: tuple
    heads: tuple
    trainable: tuple
    trainable_parameters: int
    total_parameters: int

    def __str__(self):
        """Returns a table of the adapted layers and the counts."""
        rows = [("layer", "class", "rank", "alpha", "A", "B")]
        for layer in self.adapted:
            shapes = [" x ".join(map(str, shape)) for shape in layer.shapes.values()]
            for a, b in zip(shapes[::2], shapes[1::2], strict=True):
                row = (layer.path, layer.layer_class, str(layer.rank), f"{layer.alpha:g}", a, b)
                rows.append(row)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        for head in self.heads:
            trains = any(path.startswith(f"{head}/") for path in self.trainable)
            how = "left trainable and unadapted" if trains else "left unadapted, frozen as it was"
            lines.append(f"{how}: {head}")
        for path, reason in self.skipped:
            lines.append(f"not adaptable: {path}: {reason}")
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        lines.append(
            f"trainable parameters: {self.trainable_parameters:,} of {self.total_parameters:,} "
            f"({share:.2f} %)"
        )
        return "\n".join(lines)


def count_parameters(variables):
    """Returns the number of entries in a list of variables."""
    return sum(math.prod(variable.shape) for variable in variables)
