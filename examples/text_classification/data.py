"""Labelled texts: read, split, encoded. Plain numpy, no Keras."""

import csv
import dataclasses
import pathlib
import sys

import numpy as np

from text_classification.console import InputError
from text_classification.downloads import REUTERS, fetch

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
HELD_OUT = 0.2


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts with the index of each one's label."""

    texts: list
    labels: np.ndarray

    def __len__(self):
        return len(self.texts)

    def take(self, rows):
        """Returns the texts in these rows, in this order."""
        return Texts([self.texts[row] for row in rows], self.labels[rows])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a classifier is trained on and measured with."""

    name: str
    classes: list
    train: Texts
    test: Texts

    def __str__(self):
        return (
            f"{self.name}: {len(self.train):,} texts to train on, {len(self.test):,} to test on, "
            f"{len(self.classes)} classes ({', '.join(self.classes[:12])}"
            f"{', ...' if len(self.classes) > 12 else ''})"
        )


def load_reuters(cache=None):
    """Returns Reuters R8 with its own split into training and test texts."""
    folder = fetch(REUTERS, cache)
    parts = [
        # Two lines below the column names describe the types of the columns.
        read_table(folder / f"reuters-r8-{part}.tab", "Text", "Category", skip_rows=2)
        for part in ("train", "test")
    ]
    return _encode("Reuters R8", *parts)


def load_files(data, test_data=None, text_column="text", label_column="label", seed=0):
    """Returns the texts of a CSV or TSV file; a fifth is held out if there is no test file."""
    train = read_table(data, text_column, label_column)
    if test_data is not None:
        return _encode(
            pathlib.Path(data).name, train, read_table(test_data, text_column, label_column)
        )
    index = {name: i for i, name in enumerate(_classes(data, train))}
    rows, held_out = split(np.array([index[label] for _, label in train]), HELD_OUT, seed)
    parts = [[train[row] for row in part] for part in (rows, held_out)]
    if not all(parts):
        raise InputError(f"{data}: {len(train)} texts are too few to hold out a test part")
    return _encode(pathlib.Path(data).name, *parts)


def read_table(path, text_column, label_column, skip_rows=0):
    """Returns the rows of a CSV or TSV file as pairs of text and label.

    Raises:
        InputError: The file cannot be read, or lacks a column; the message names the columns.
    """
    path = pathlib.Path(path)
    delimiter = DELIMITERS.get(path.suffix.lower())
    if delimiter is None:
        raise InputError(f"{path}: expected a file that ends in {', '.join(DELIMITERS)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    csv.field_size_limit(sys.maxsize)
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, quoting=quoting)
            columns = reader.fieldnames or []
            for column, option in ((text_column, "text"), (label_column, "label")):
                if column not in columns:
                    raise InputError(
                        f"{path}: no column {column!r}; its columns are "
                        f"{', '.join(map(repr, columns)) or 'none'} (--{option}-column names it)"
                    )
            rows = [(row[text_column], row[label_column]) for row in reader][skip_rows:]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    for number, (text, label) in enumerate(rows, start=1):
        if not text or not label:
            raise InputError(f"{path}: row {number} has no text or no label")
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def split(labels, fraction, seed):
    """Returns two arrays of rows, the second with a `fraction` of every class, both shuffled."""
    rng = np.random.default_rng(seed)
    rest, part = [], []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = round(fraction * len(rows))
        part.append(rows[:count])
        rest.append(rows[count:])
    return rng.permutation(np.concatenate(rest)), rng.permutation(np.concatenate(part))


def _classes(name, rows):
    classes = sorted({label for _, label in rows})
    if len(classes) < 2:
        raise InputError(f"{name}: expected at least two different labels, got {classes}")
    return classes


def _encode(name, train, test):
    classes = _classes(name, train)
    unknown = sorted({label for _, label in test} - set(classes))
    if unknown:
        raise InputError(f"{name}: labels in the test texts only: {', '.join(unknown)}")
    index = {label: i for i, label in enumerate(classes)}

    def encode(rows):
        labels = np.array([index[label] for _, label in rows], dtype="int32")
        return Texts([text for text, _ in rows], labels)

    return Dataset(name, classes, encode(train), encode(test))
