"""Puts the demo's model and texts, MiniLM-L6 and Reuters R8, where sweep_text.toml looks for them.

python examples/prepare_text_sweep.py
python -m keras_loraplus sweep --config examples/sweep_text.toml
"""

import csv
import pathlib
import shutil

from text_classification import data
from text_classification.console import Parser, run
from text_classification.downloads import MINILM, fetch


def write_table(path, texts, classes):
    """Writes texts as `python -m keras_loraplus sweep` reads them."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
        writer.writerow(["label", "text_a", "text_b"])
        for text, label in zip(texts.texts, texts.labels, strict=True):
            writer.writerow([classes[label], " ".join(text.split()), ""])


def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="sweep_text", help="default: sweep_text")
    folder = pathlib.Path(parser.parse_args(arguments).folder)
    reuters, model = data.load_reuters(), fetch(MINILM)
    (folder / "r8").mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        write_table(folder / "r8" / f"{name}.tsv", getattr(reuters, name), reuters.classes)
    shutil.copytree(model, folder / "minilm", dirs_exist_ok=True)
    print(f"Written: {folder / 'r8'} and {folder / 'minilm'}")


if __name__ == "__main__":
    run(main)
