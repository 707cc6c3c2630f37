"""Texts and pairs of texts with labels, from folders that the user names."""

import csv
import dataclasses
import pathlib
import sys

import numpy as np

from text_classification import data
from text_classification.console import InputError


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples: first texts, second texts or None, and the indices of the labels."""

    first: list
    second: list | None
    labels: np.ndarray

    def __len__(self):
        return len(self.first)

    def take(self, rows):
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


def load(name, folder, train_texts=0, validation_texts=0, test_texts=0):
    """Returns a task; a number of texts of 0 means all.

    Args:
        name: `"r8"`, which comes from a package, or any other name.
        folder: Folder with `train.tsv`, `test.tsv` and, if there is one, `dev.tsv`, tables with
            the columns `label`, `text_a` and `text_b` (empty for single texts). Without `dev.tsv`
            a fifth of the training texts is held out. Not used for `"r8"`.
        train_texts: How many to train on at most, a random choice that is the same every time.
        validation_texts: How many to select by at most.
        test_texts: How many to measure with at most.
    """
    if name == "r8":
        texts = data.load_reuters()
        parts = {"train": texts.train, "test": texts.test}
        parts = {key: Part(part.texts, None, part.labels) for key, part in parts.items()}
        classes = texts.classes
    else:
        rows = {part: _read(pathlib.Path(folder) / f"{part}.tsv") for part in ("train", "test")}
        dev = pathlib.Path(folder) / "dev.tsv"
        if dev.exists():
            rows["dev"] = _read(dev)
        classes = sorted({label for part in rows.values() for label, _, _ in part})
        parts = {part: _encode(table, classes) for part, table in rows.items()}
    if "dev" not in parts:
        kept, held_out = data.split(parts["train"].labels, data.HELD_OUT, seed=0)
        parts["dev"] = parts["train"].take(held_out)
        parts["train"] = parts["train"].take(kept)
    limits = {"train": train_texts, "dev": validation_texts, "test": test_texts}
    parts = {key: _some(part, limits[key]) for key, part in parts.items()}
    return Task(name, classes, parts["train"], parts["dev"], parts["test"])


def _some(part, count):
    rows = np.random.default_rng(0).permutation(len(part))
    return part.take(rows[:count] if count else rows)


def _read(path):
    if not path.is_file():
        raise InputError(f"{path}: no such file; a task's folder has train.tsv and test.tsv")
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not {"label", "text_a"} <= set(reader.fieldnames or []):
            raise InputError(f"{path}: expected columns label, text_a and text_b")
        return [(row["label"], row["text_a"], row.get("text_b") or "") for row in reader]


def _encode(rows, classes):
    index = {label: i for i, label in enumerate(classes)}
    labels = np.array([index[label] for label, _, _ in rows], dtype="int32")
    second = [b for _, _, b in rows]
    return Part([a for _, a, _ in rows], second if any(second) else None, labels)
