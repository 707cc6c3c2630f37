"""A tiny BERT preset and a tiny table of texts, so that the demo runs without a download."""

import csv
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from tiny_presets import save_bert

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
WORDS = {
    "earn": ["profit", "dividend", "quarter", "shares"],
    "grain": ["wheat", "corn", "harvest", "tonnes"],
}
FILLERS = ["the", "of", "said", "company", "market", "in"]


@pytest.fixture
def run_example():
    """Runs an example in a process of its own, as a user does."""

    def run(name, *arguments, **environment):
        return subprocess.run(
            [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def table(tmp_path):
    """A CSV file with columns `body` and `topic`; the topic shows in the words."""
    rng = np.random.default_rng(7)
    path = tmp_path / "texts.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "body", "topic"])
        for number in range(160):
            topic = list(WORDS)[number % 2]
            words = [*rng.choice(WORDS[topic], size=3), *rng.choice(FILLERS, size=4)]
            writer.writerow([number, ", ".join(rng.permutation(words)), topic])
    return path


@pytest.fixture
def preset(tmp_path):
    """A folder with a random BERT of two narrow layers and its tokenizer."""
    words = [word for topic in WORDS.values() for word in topic] + FILLERS
    settings = {"num_layers": 2, "max_sequence_length": 32}
    return save_bert(tmp_path / "tiny_bert", [",", *words], **settings)
