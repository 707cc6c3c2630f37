"""What a sweep found: tidy records, the selection, and its JSON."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any

from keras_loraplus.adapters.atomic import write_atomically

FORMAT = "keras_loraplus.sweep"
VERSION = 1
NAMES = {"loraplus": "LoRA+", "lora": "LoRA", "full": "full fine-tuning"}


@dataclasses.dataclass
class SweepResult:
    """The result of `sweep`; `print(result)` is a table of what was selected.

    Attributes:
        monitor: The metric of the validation data that cells were selected by.
        mode: `"max"` or `"min"`.
        seeds: Seeds that every cell was tried with.
        axes: The axes of every arm.
        budget: Number of cells of every arm; seeds not counted.
        records: One dictionary a cell and seed: `arm`, `eta_a`, `eta_b`, `lr_ratio`, `head_rate`,
            `seed`, `status` (`"complete"`, `"pruned"`, `"diverged"`, `"failed"`), `value` (of the
            monitored metric), `metrics`, `error`, `curve` (`steps` and `values` of the monitored
            metric), `seconds`.
        test: One dictionary an arm and seed, with `test_metrics` of the selected cell; empty if the
            sweep was given no test data.
        setup: How cells were trained, and what `about` of `sweep` held.
        versions: Versions of Python and of the packages.
        missing: Number of cells and seeds without a record. 0 unless the sweep was interrupted.
    """

    monitor: str
    mode: str
    seeds: list[int]
    axes: dict[str, dict[str, Any]]
    budget: dict[str, int]
    records: list[dict[str, Any]]
    test: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    setup: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: int = 0

    @property
    def arms(self) -> list[str]:
        """The arms that have records."""
        return [arm for arm in NAMES if any(r["arm"] == arm for r in self.records)]

    def cells(self, arm: str) -> list[dict[str, Any]]:
        """Returns the cells of an arm, averaged over the seeds, best first.

        Only cells that were trained to the end with every seed: one that diverged, failed or was
        pruned with any of them is no choice. Equal means are ordered by the mean validation loss.

        Returns:
            Dictionaries with `arm`, `eta_a`, `eta_b`, `lr_ratio`, `head_rate`, `mean`, `std` (over
            the seeds; None for one), `values` and `loss` (the mean of `metrics["loss"]`, or None).
        """
        groups: dict[tuple, list[dict[str, Any]]] = {}
        for record in self.records:
            if record["arm"] == arm and record["status"] == "complete":
                rates = (record["eta_a"], record["eta_b"], record["head_rate"])
                groups.setdefault(rates, []).append(record)
        cells = []
        for group in groups.values():
            if {record["seed"] for record in group} != set(self.seeds):
                continue
            values = [record["value"] for record in group]
            losses = [record["metrics"].get("loss") for record in group]
            named = ("arm", "eta_a", "eta_b", "lr_ratio", "head_rate")
            cells.append(
                {
                    **{name: group[0][name] for name in named},
                    "mean": statistics.fmean(values),
                    "std": statistics.stdev(values) if len(values) > 1 else None,
                    "values": values,
                    "loss": None if None in losses else statistics.fmean(losses),
                }
            )
        sign = -1 if self.mode == "max" else 1
        return sorted(cells, key=lambda cell: (sign * cell["mean"], cell["loss"] or 0.0))

    def selected(self, arm: str) -> dict[str, Any] | None:
        """Returns the best cell of an arm by the validation data, or None if none was finished."""
        cells = self.cells(arm)
        return cells[0] if cells else None

    def on_edge(self, arm: str) -> list[str]:
        """Returns the axes on whose edge the selected cell lies, where a better one may lie beyond.

        Only axes that are lists of at least two rates.
        """
        best = self.selected(arm)
        if best is None:
            return []
        found = []
        for name, values in self.axes[arm].items():
            if isinstance(values, list) and len(values) > 1:
                if name == "head_ratio":
                    position = best["head_rate"] / best["eta_a"]
                else:
                    position = best[name]
                at = [abs(position / edge - 1) < 1e-6 for edge in (min(values), max(values))]
                if any(at):
                    found.append(name)
        return found

    def to_pandas(self) -> Any:
        """Returns the records as a `pandas.DataFrame`, metrics in columns of their own.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "A table needs pandas: pip install pandas. `records` holds the same, as plain "
                "dictionaries."
            ) from error
        plain = ("metrics", "curve")
        return pandas.DataFrame(
            [
                {**{k: v for k, v in record.items() if k not in plain}, **_metrics(record)}
                for record in self.records
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as JSON holds it, with the selected cells."""
        content = dataclasses.asdict(self)
        selected = {arm: self.selected(arm) for arm in self.arms}
        edges = {arm: self.on_edge(arm) for arm in self.arms}
        head = {"format": FORMAT, "version": VERSION, "selected": selected, "on_edge": edges}
        return {**head, **content}

    def save(self, path: Any) -> None:
        """Writes everything as JSON; an interrupted write leaves the old file whole."""
        text = json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"
        write_atomically(path, text.encode())

    def __str__(self) -> str:
        """Returns a table with the selected cell of each arm."""
        header = ("method", self.monitor, "std", "test", "eta_A", "eta_B", "ratio", "head", "cells")
        rows: list[tuple[str, ...]] = [header]
        for arm in self.arms:
            best = self.selected(arm)
            if best is None:
                rows.append((NAMES[arm], *["-"] * 7, str(self.budget[arm])))
                continue
            rates = [best["eta_a"], best["eta_b"], best["lr_ratio"], best["head_rate"]]
            if arm == "full":
                rates[2] = None
            mean, std = f"{best['mean']:.4f}", _number(best["std"], ".4f")
            test = _number(self._test_mean(arm), ".4f")
            cells = str(self.budget[arm])
            rows.append((NAMES[arm], mean, std, test, *(_number(r, ".3g") for r in rates), cells))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''} a cell"
        lines.append(f"Selected by the mean {self.monitor} of the validation data, {seeds}.")
        for arm in self.arms:
            edges = self.on_edge(arm)
            if edges:
                lines.append(f"{NAMES[arm]}: the best cell is on the edge of {', '.join(edges)}.")
        for status in ("diverged", "failed", "pruned"):
            count = sum(record["status"] == status for record in self.records)
            if count:
                lines.append(f"{count} of {len(self.records)} trials {status}.")
        for arm in self.arms:
            if any(record["arm"] == arm for record in self.test) and not self.tested(arm):
                lines.append(
                    f"{NAMES[arm]}: the test data were read for a cell that was the best before "
                    "more cells were tried, and are not read again."
                )
        if self.missing:
            lines.append(f"{self.missing} trials are still missing.")
        return "\n".join(lines)

    def tested(self, arm: str) -> list[dict[str, Any]]:
        """Returns the records of the test data that are of the selected cell of an arm."""
        best = self.selected(arm)
        return [
            record
            for record in self.test
            if record["arm"] == arm
            and best is not None
            and all(record[name] == best[name] for name in ("eta_a", "eta_b", "head_rate"))
        ]

    def _test_mean(self, arm: str) -> float | None:
        values = [r.get("test_metrics", {}).get(self.monitor) for r in self.tested(arm)]
        return None if None in values or not values else statistics.fmean(values)


def load(path: Any) -> SweepResult:
    """Reads what `SweepResult.save` wrote.

    Raises:
        ValueError: If the file is none of a sweep, or of a later version.
    """
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}' is no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"'{path}' does not hold a sweep: expected the format {FORMAT!r}.")
    if content.get("version") != VERSION:
        raise ValueError(
            f"'{path}' has version {content.get('version')!r}; this library reads {VERSION}."
        )
    names: Sequence[str] = [field.name for field in dataclasses.fields(SweepResult)]
    return SweepResult(**{name: content[name] for name in names})


def _metrics(record: dict[str, Any]) -> dict[str, Any]:
    return dict(record["metrics"])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
