"""A language model adapted to a task as text, at eta_B/eta_A of 1, 4 and 16.

    python examples/reproduce/llm.py --storage sweeps --data DIR

By default in small (configs/llm/smollm2.toml): SmolLM2-135M on Banking77, on a float32 and on an
int4 base. The model reads a text and writes the name of its class; only the name's tokens count in
the loss. Ratio 1 is plain LoRA; every ratio is tried at each eta_A. SmolLM2 is unpacked by gguf,
transformers and torch (the extra `examples`). `--config` names another setting, such as
configs/llm/llama_mnli.toml, the article's. Started again with the same storage, it goes on, and
several processes may share one storage (with OMP_NUM_THREADS=1 each, on few cores). The finished
sweep of a base is kept in results/llm/ and not run again; llm.json and the picture are of all kept.
"""

import gc
import json
import pathlib

import common
import numpy as np
import tasks
from glue import read_config

from text_classification import report
from text_classification.console import InputError, Parser, choose_backend, run
from text_classification.downloads import SMOLLM2, cache_folder, fetch

CONFIGS = pathlib.Path(__file__).with_name("configs") / "llm"
METRICS = {"loss": "loss per token of the answers", "exact_match": "exact matches"}
# One for each ratio; grey paper tells them apart.
STYLES = ("o-", "s--", "^:", "v-.", "d-")


def unpack_smollm2():
    """Returns the folder of SmolLM2 as a plain Llama checkpoint, which KerasHub reads."""
    target = cache_folder() / "smollm2-135m-llama"
    if target.exists():
        return target
    try:
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise InputError(
            "SmolLM2 needs more packages: pip install 'keras-loraplus[examples]'"
        ) from error
    folder = fetch(SMOLLM2)
    (file,) = folder.glob("*.gguf")
    partial = target.with_name(f"{target.name}.partial")
    packed = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name)
    # Its values are floats already, but it is marked as quantized and refuses to be saved.
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).float()
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(partial)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    tokenizer.save_pretrained(partial)
    # KerasHub looks for the base of the rotary embedding where older versions wrote it.
    path = partial / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    nested = config.get("rope_parameters") or {}
    config.setdefault("rope_theta", nested.get("rope_theta", 10000.0))
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    partial.rename(target)
    return target


def encode(tokenizer, part, classes, length):
    """Returns inputs and the next tokens, -1 where they do not count; no answer loses a part.

    Args:
        tokenizer: A KerasHub tokenizer, which adds no special tokens.
        part: A `keras_loraplus.tuning.text.Part`.
        classes: Names of the classes.
        length: Number of tokens; longer texts lose their beginning.
    """
    end = getattr(tokenizer, "end_token_id", None)
    shape = (len(part), length)
    tokens = np.zeros(shape, "int32")
    targets, seen = np.full(shape, -1, "int32"), np.zeros(shape, bool)
    for row in range(len(part)):
        text = part.first[row] if part.second is None else f"{part.first[row]} | {part.second[row]}"
        name = classes[part.labels[row]].replace("_", " ")
        question = [int(token) for token in np.asarray(tokenizer(f"{text} ->")).reshape(-1)]
        answer = [int(token) for token in np.asarray(tokenizer(f" {name}")).reshape(-1)]
        answer += [] if end is None else [int(end)]
        if len(answer) > length:
            raise InputError(f"the answer {name!r} has {len(answer)} tokens, more than {length}")
        # One more than fits: each token but the last is read, each but the first is predicted.
        both = (question + answer)[-(length + 1) :]
        count = len(both) - 1
        tokens[row, :count], seen[row, :count] = both[:-1], True
        targets[row, count - len(answer) : count] = answer
    return {"token_ids": tokens, "padding_mask": seen}, targets


def measure(model, data, batch_size):
    """Returns the loss per token of the answers, and how many answers are right to the last token.

    What greedy decoding writes is right exactly if every token is the most likely one after the
    right tokens before it, so that one pass tells.
    """
    inputs, targets = data
    losses, right = 0.0, 0
    for start in range(0, len(targets), batch_size):
        rows = slice(start, start + batch_size)
        logits = model.predict_on_batch({key: value[rows] for key, value in inputs.items()})
        logits = np.asarray(logits, "float64")
        logits -= logits.max(axis=-1, keepdims=True)
        expected, counts = np.maximum(targets[rows], 0), targets[rows] >= 0
        chosen = np.take_along_axis(logits, expected[..., None], axis=-1)[..., 0]
        losses += np.sum((np.log(np.exp(logits).sum(axis=-1)) - chosen)[counts])
        wrong = (logits.argmax(axis=-1) != expected) & counts
        right += int(np.sum(~wrong.any(axis=1)))
    return {"loss": losses / np.sum(targets >= 0), "exact_match": right / len(targets)}


def load_model(preset, base):
    """Returns a KerasHub language model with a float or a quantized base."""
    import keras_hub

    dtype = base if base in ("float32", "bfloat16") else "float32"
    model = keras_hub.models.CausalLM.from_preset(preset, preprocessor=None, dtype=dtype)
    if base != dtype:
        # Keras 3.15.1 looks through all objects for garbage each time that a layer drops a float
        # kernel, 241 times here: minutes, unless what exists already is left out of it.
        gc.freeze()
        try:
            model.quantize(base)
        finally:
            gc.unfreeze()
    return model


def setting_of(config):
    """Returns what of the configuration the sweep of one base depends on."""
    return {name: value for name, value in config.items() if name != "bases"}


def sweep_base(config, task, preset, base, storage, **overrides):
    """Sweeps rates and ratios on one base; returns the result of `klp.tuning.sweep`.

    `overrides` are arguments of `sweep` that take the place of those of the configuration.
    """
    import keras
    import keras_hub

    import keras_loraplus as klp
    from keras_loraplus import tuning

    tokenizer = keras_hub.models.Tokenizer.from_preset(preset)
    length, batch_size = config["sequence_length"], config["batch_size"]
    train, validation, test = (
        encode(tokenizer, part, task.classes, length)
        for part in (task.train, task.validation, task.test)
    )

    def build(cell):
        model = load_model(preset, base)
        klp.enable_lora_plus(model, rank=config["rank"], init=config["init"])
        return model

    settings = {
        "test": lambda model: measure(model, test, batch_size),
        "eta_a": config["eta_a"],
        "lr_ratio": config["lr_ratio"],
        "lora": False,
        "seeds": config["seeds"],
        "epochs": config["epochs"],
        "batch_size": batch_size,
        "schedule": config["schedule"],
        "monitor": config["monitor"],
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1),
        "about": {"base": base, "setting": setting_of(config)},
        "storage": storage,
        "name": f"{config['task']}/{base}",
    }
    judge = lambda model: measure(model, validation, batch_size)  # noqa: E731
    return tuning.sweep(build, train, judge, **{**settings, **overrides})


def cells_of(result):
    """Returns each finished cell with the means over the seeds of both metrics, best first."""
    cells = []
    for cell in result.cells("loraplus"):
        rates = ("eta_a", "eta_b", "lr_ratio")
        mine = [
            record["metrics"]
            for record in result.records
            if record["status"] == "complete" and all(record[name] == cell[name] for name in rates)
        ]
        means = {name: common.plain(np.mean([m[name] for m in mine])) for name in METRICS}
        cells.append({**{name: cell[name] for name in rates}, **means})
    return cells


def summary(result):
    """Returns the best cell of each ratio, and the test of the best of all, as plain data."""
    best = {}
    for cell in cells_of(result):
        best.setdefault(f"{cell['lr_ratio']:g}", cell)
    return {
        "base": result.setup["about"]["base"],
        "selected_by": result.monitor,
        "best_by_ratio": best,
        "test": [
            {name: record[name] for name in ("eta_a", "eta_b", "seed", "test_metrics")}
            for record in result.test
        ],
        "cells": cells_of(result),
        "not_complete": sum(r["status"] != "complete" for r in result.records),
        "missing": result.missing,
        "trial_seconds": round(sum(r["seconds"] for r in (*result.records, *result.test))),
        "versions": result.versions,
    }


def write(output, config, found):
    """Writes what was found so far, as JSON and as a picture of both metrics over eta_B."""
    content = {"setting": config, "bases": [summary(result) for result in found]}
    report.write_json(content, f"{output}.json")
    pyplot = common.pyplot()
    size = (5 * len(found), 3.6 * len(METRICS))
    figure, axes = pyplot.subplots(
        len(METRICS), len(found), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for column, result in enumerate(found):
        cells = cells_of(result)
        for row, name in enumerate(METRICS):
            axis = axes[row][column]
            for ratio, style in zip(config["lr_ratio"], STYLES, strict=False):
                mine = [cell for cell in cells if abs(cell["lr_ratio"] / ratio - 1) < 1e-6]
                mine.sort(key=lambda cell: cell["eta_b"])
                points = [cell["eta_b"] for cell in mine], [cell[name] for cell in mine]
                axis.plot(*points, f"k{style}", label=f"ratio {ratio:g}")
            axis.set(xscale="log", xlabel=r"$\eta_B$")
            axis.legend(fontsize="small")
        axes[0][column].set_title(f"{result.setup['about']['base']} base")
    for row, label in enumerate(METRICS.values()):
        axes[row][0].set_ylabel(label)
    # One cell that came near to diverging would flatten all others; the axis is shared.
    axes[0][0].set_yscale("log")
    for which in (axes[0][0].yaxis.set_major_formatter, axes[0][0].yaxis.set_minor_formatter):
        which(pyplot.matplotlib.ticker.ScalarFormatter())
    trained = config["train_texts"] or "all"
    figure.suptitle(
        f"{config['preset']} on {config['task']}, validation texts; {trained} training texts,\n"
        f"rank {config['rank']}, init {config['init']}, seeds {config['seeds']}",
        fontsize="small",
    )
    figure.savefig(f"{output}.png", dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=CONFIGS / "smollm2.toml")
    parser.add_argument("--data", required=True, help="folder of the configuration's task")
    parser.add_argument("--storage", required=True, help="folder that the sweeps are kept in")
    parser.add_argument("--output", default=common.RESULTS / "llm", help="path without an ending")
    parser.add_argument(
        "--backend", default="jax", help="JAX compiles the unpacking of an int4 base"
    )
    options = parser.parse_args(arguments)
    config = read_config(options.config)
    bases = config["bases"]
    choose_backend(options.backend)
    storage, folder = pathlib.Path(options.storage), pathlib.Path(options.output)
    kept = {base: common.read_kept(folder / f"{base}.json", setting_of(config)) for base in bases}
    limits = {key: config[key] for key in ("train_texts", "validation_texts", "test_texts")}
    if None in kept.values():
        task = tasks.load(config["task"], options.data, **limits)
        preset = str(unpack_smollm2()) if config["preset"] == "smollm2" else config["preset"]
    for path in (storage, folder):
        path.mkdir(parents=True, exist_ok=True)
    for base in bases:
        if kept[base] is None:
            path = storage / f"llm_{config['task']}_{base}.db"
            kept[base] = sweep_base(config, task, preset, base, path)
            kept[base].save(folder / f"{base}.json")
        write(options.output, config, [result for result in kept.values() if result])


if __name__ == "__main__":
    run(main)
