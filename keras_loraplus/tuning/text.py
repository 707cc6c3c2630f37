"""Text classification for sweeps: labelled texts in, a KerasHub classifier a cell, a result out."""

import csv
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_loraplus._compat import hub_text_classifier, hub_text_preprocessor
from keras_loraplus.enable import enable_lora_plus
from keras_loraplus.tuning.cells import Cell
from keras_loraplus.tuning.result import SweepResult
from keras_loraplus.tuning.sweep import sweep

# Of the training texts, where the user has set none aside to select by.
HELD_OUT = 0.2


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples: first texts, second texts or None, and the indices of the labels."""

    first: list
    second: list | None
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def take(self, rows: Any) -> "Part":
        """Returns the examples in these rows, in this order."""
        second = None if self.second is None else [self.second[row] for row in rows]
        return Part([self.first[row] for row in rows], second, self.labels[rows])


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model is trained on, selected by and, once, measured with."""

    name: str
    classes: list
    train: Part
    validation: Part
    test: Part


def read_task(folder: Any, name: str | None = None, **limits: int) -> Task:
    """Returns the task in a folder.

    Args:
        folder: Folder with `train.tsv`, `test.tsv` and, if there is one, `dev.tsv`: UTF-8 tables
            with a header and the columns `label`, `text_a` and `text_b` (empty, or left out, for
            single texts). Without `dev.tsv` a fifth of the training texts is held out.
        name: Name of the task; None for the folder's.
        **limits: As of `make_task`.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file does not hold such a table.
    """
    folder = pathlib.Path(folder)
    rows = {part: _read(folder / f"{part}.tsv") for part in ("train", "test")}
    dev = folder / "dev.tsv"
    if dev.exists():
        rows["validation"] = _read(dev)
    classes = sorted({label for part in rows.values() for label, _, _ in part})
    if len(classes) < 2:
        raise ValueError(f"{folder}: expected at least two different labels, got {classes}")
    index = {label: i for i, label in enumerate(classes)}
    parts = {}
    for part, table in rows.items():
        second = [b for _, _, b in table]
        labels = np.array([index[label] for label, _, _ in table], dtype="int32")
        parts[part] = Part([a for _, a, _ in table], second if any(second) else None, labels)
    return make_task(name or folder.resolve().name, classes, parts, **limits)


def make_task(
    name: str,
    classes: list,
    parts: Mapping[str, Part],
    train_texts: int = 0,
    validation_texts: int = 0,
    test_texts: int = 0,
) -> Task:
    """Returns a task of parts, each cut to a number of texts of which 0 means all.

    Args:
        name: Name of the task.
        classes: Names of the classes.
        parts: `"train"`, `"test"` and, if there is one, `"validation"`; without it a fifth of each
            class of the training texts is held out.
        train_texts: How many to train on at most, a random choice that is the same every time.
        validation_texts: How many to select by at most.
        test_texts: How many to measure with at most.
    """
    parts = dict(parts)
    if "validation" not in parts:
        kept, held_out = _hold_out(parts["train"].labels)
        parts["validation"] = parts["train"].take(held_out)
        parts["train"] = parts["train"].take(kept)
        if not len(held_out):
            raise ValueError(
                f"{name}: the classes have too few training texts to hold out a part to select "
                "by. Give more, or a dev.tsv."
            )
    limits = {"train": train_texts, "validation": validation_texts, "test": test_texts}
    cut = {part: _some(parts[part], limit) for part, limit in limits.items()}
    return Task(name, classes, cut["train"], cut["validation"], cut["test"])


def _hold_out(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    kept, held_out = [], []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = round(HELD_OUT * len(rows))
        held_out.append(rows[:count])
        kept.append(rows[count:])
    return rng.permutation(np.concatenate(kept)), rng.permutation(np.concatenate(held_out))


def _some(part: Part, count: int) -> Part:
    rows = np.random.default_rng(0).permutation(len(part))
    return part.take(rows[:count] if count else rows)


def _read(path: pathlib.Path) -> list[tuple[str, str, str]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; a task's folder has train.tsv, test.tsv and possibly dev.tsv"
        )
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if not {"label", "text_a"} <= set(reader.fieldnames or []):
                raise ValueError(
                    f"{path}: expected a header with the columns label, text_a and text_b, "
                    f"separated by tabs. Received: {reader.fieldnames}"
                )
            rows = [(row["label"], row["text_a"], row.get("text_b") or "") for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    for number, (label, text, _) in enumerate(rows, start=1):
        if not label or text is None:
            raise ValueError(f"{path}: row {number} has no label or no text_a")
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return rows


def encode(preset: str, part: Part, sequence_length: int) -> tuple[dict[str, np.ndarray], Any]:
    """Returns the model's inputs, as arrays, and the labels.

    Raises:
        ImportError: If keras_hub is not installed.
        ValueError: If the preset cannot be loaded.
    """
    preprocessor = hub_text_preprocessor(preset, sequence_length)
    texts = part.first if part.second is None else (part.first, part.second)
    # A pair of lists by itself would be taken for texts and labels.
    values, labels = preprocessor(texts, part.labels)
    return {name: np.asarray(value) for name, value in values.items()}, labels


@dataclasses.dataclass(frozen=True)
class Builder:
    """Builds the classifier of a cell; what `sweep` takes as `build`.

    Attributes:
        preset: A KerasHub preset, or a folder.
        classes: Number of classes.
        rank: Rank of the adapters.
        targets: As of `enable_lora_plus`.
        init: As of `enable_lora_plus`.
        dtype: Dtype policy of the pretrained part and the head.
    """

    preset: str
    classes: int
    rank: int
    targets: str | Sequence[str] | None = None
    init: str = "loraplus"
    dtype: str = "float32"

    def __call__(self, cell: Cell) -> Any:
        """Returns pretrained weights, a new head and, unless the arm is `"full"`, adapters."""
        model = hub_text_classifier(self.preset, self.classes, self.dtype)
        if cell.arm != "full":
            enable_lora_plus(model, rank=self.rank, targets=self.targets, init=self.init)
        return model


def sweep_task(
    task: Task,
    build: Builder,
    sequence_length: int,
    about: Mapping[str, Any] | None = None,
    **settings: Any,
) -> SweepResult:
    """Sweeps the rates of a text classifier; the test texts are read once, after the selection.

    Args:
        task: The texts.
        build: What makes the models.
        sequence_length: Tokens a text is cut or padded to.
        about: What to write into the result besides, or in place of what is written by default.
        **settings: Arguments of `sweep`: the rates, seeds, epochs, batch size, storage and so on.

    Returns:
        What `sweep` returns.

    Raises:
        ImportError: If keras_hub or Optuna is not installed.
        ValueError: If the preset cannot be loaded, or an argument is not as of `sweep`.
        RuntimeError: If every cell failed.
    """
    parts = {
        name: encode(build.preset, getattr(task, name), sequence_length)
        for name in ("train", "validation", "test")
    }
    most_frequent = int(np.bincount(task.train.labels).argmax())
    written = {
        "task": task.name,
        "init": build.init,
        "sequence_length": sequence_length,
        "preset": build.preset,
        "rank": build.rank,
        "dtype": build.dtype,
        "classes": len(task.classes),
        "most_frequent_class": float(np.mean(task.validation.labels == most_frequent)),
        "rows": {name: len(labels) for name, (_, labels) in parts.items()},
    }
    if build.targets is not None:
        written["targets"] = build.targets
    defaults = {
        "test": parts["test"],
        "monitor": "accuracy",
        "metrics": ["accuracy"],
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "about": {**written, **(about or {})},
        "name": f"{task.name}/{build.init}",
    }
    return sweep(build, parts["train"], parts["validation"], **{**defaults, **settings})
