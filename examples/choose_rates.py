"""Chooses the default rates of finetune_text_classifier.py; writes rates.json.

    python choose_rates.py --backend jax

Every method gets a grid of its own, LoRA+ and plain LoRA one of the same number of trials. A trial
trains on a part of the Reuters R8 training texts and is judged on another part of them. The test
texts are not even tokenized here. The highest validation accuracy wins; among equals the lowest
validation loss does. Trials already in the file are not run again, so an interrupted run goes on
where it stopped.
"""

import itertools
import json
import pathlib
import platform
import time
from importlib import metadata

from text_classification import data, report
from text_classification.console import Parser, choose_backend, integer, quiet_stderr, run
from text_classification.downloads import MINILM, REUTERS, fetch

NAMES = ("learning_rate", "lr_ratio", "head_multiplier")
GRIDS = {
    "loraplus": ((5e-4, 1e-3, 2e-3), (8.0, 16.0), (8.0, 16.0)),
    "lora": ((1e-3, 2e-3, 4e-3, 8e-3), (1.0,), (1.0, 2.0, 4.0)),
    # Not one of the two methods compared, and the most expensive: fewer trials.
    "full": ((1e-4, 3e-4), (1.0,), (8.0,)),
}
SETUP = {
    "model": MINILM.requirement,
    "data": REUTERS.requirement,
    "train_texts": 1200,
    "validation_texts": 600,
    "sequence_length": 32,
    "batch_size": 16,
    "epochs": 2,
    "rank": 8,
    "schedule": "linear to zero",
}


def grid(method, seed):
    for values in itertools.product(*GRIDS[method]):
        yield {"method": method, **dict(zip(NAMES, values, strict=True)), "seed": seed}


def choose(trials):
    """Returns the chosen rates of each method that has trials, averaged over the seeds."""
    chosen = {}
    for method in GRIDS:
        scores = {}
        for trial in trials:
            if trial["method"] == method:
                score = (trial["validation_accuracy"], -trial["validation_loss"])
                scores.setdefault(tuple(trial[name] for name in NAMES), []).append(score)
        if scores:
            means = {
                rates: tuple(sum(part) / len(part) for part in zip(*values, strict=True))
                for rates, values in scores.items()
                # A setting tried with fewer seeds than another is not compared with it.
                if len(values) == max(map(len, scores.values()))
            }
            chosen[method] = dict(zip(NAMES, max(means, key=means.get), strict=True))
    return chosen


def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", help="tensorflow, jax or torch")
    parser.add_argument("--output", default=pathlib.Path(__file__).with_name("rates.json"))
    parser.add_argument("--seeds", type=integer(0), nargs="+", default=[0])
    parser.add_argument("--methods", choices=tuple(GRIDS), nargs="+", default=list(GRIDS))
    options = parser.parse_args(arguments)
    choose_backend(options.backend)
    path = pathlib.Path(options.output)
    done = json.loads(path.read_text(encoding="utf-8")).get("trials", []) if path.exists() else []
    preset = str(fetch(MINILM))
    texts = data.load_reuters().train
    rows, held_out = data.split(texts.labels, 0.2, seed=0)
    parts = [rows[: SETUP["train_texts"]], held_out[: SETUP["validation_texts"]]]
    parts = [texts.take(part) for part in parts]
    with quiet_stderr():
        import keras

        import keras_loraplus as klp
        from text_classification import training

        length = SETUP["sequence_length"]
        inputs = [training.tokenize(preset, part.texts, length) for part in parts]
    train, validation = ((x, part.labels) for x, part in zip(inputs, parts, strict=True))

    def try_out(trial):
        keras.utils.clear_session()
        keras.utils.set_random_seed(trial["seed"])
        model = training.build_classifier(preset, int(texts.labels.max()) + 1)
        if trial["method"] != "full":
            klp.enable_lora_plus(model, rank=SETUP["rank"], init=trial["method"])
        rates = training.Rates(**{name: trial[name] for name in NAMES})
        steps = training.steps_in(len(train[1]), SETUP["batch_size"], SETUP["epochs"])
        training.compile_classifier(model, training.make_optimizer(model, rates, steps))
        start = time.perf_counter()
        model.fit(
            *train,
            batch_size=SETUP["batch_size"],
            epochs=SETUP["epochs"],
            shuffle=False,
            verbose=0,
        )
        seconds = time.perf_counter() - start
        loss, accuracy = training.evaluate(model, *validation, batch_size=100)
        scores = {"validation_accuracy": accuracy, "validation_loss": loss}
        return {**trial, **{k: round(v, 5) for k, v in scores.items()}, "seconds": round(seconds)}

    versions = {name: metadata.version(name) for name in ("keras", "keras-hub", "numpy")}
    versions["backend"] = keras.backend.backend()
    versions["python"] = platform.python_version()
    keys = ("method", *NAMES, "seed")
    known = {tuple(trial[key] for key in keys) for trial in done}
    for method, seed in itertools.product(options.methods, options.seeds):
        for trial in grid(method, seed):
            if tuple(trial[key] for key in keys) in known:
                continue
            done.append(try_out(trial))
            print(json.dumps(done[-1]), flush=True)
            content = {"chosen": choose(done), "how": how(), "setup": SETUP, "versions": versions}
            report.write_json({**content, "trials": done}, path)


def how():
    return " ".join(__doc__.split("\n\n", 2)[2].split())


if __name__ == "__main__":
    run(main)
