"""The article's GLUE figure: accuracy over the rates of A and B, and the ratios of the best cells.

    python examples/reproduce/glue.py --storage sweeps --data cola=DIR sst2=DIR mrpc=DIR ...

By default in small (configs/minilm.toml): MiniLM-L6 on CoLA, SST-2, MRPC, Banking77 and Reuters R8,
a 5 x 5 grid, two seeds; plain LoRA has as many cells as LoRA+. `--config` names another setting,
such as configs/roberta.toml, the article's own. Stop it whenever you like: started again with the
same storage, it goes on, and several processes may share one storage (with OMP_NUM_THREADS=1 each,
on few cores). A finished sweep is kept in results/glue/ and not run again; after each, glue.json
and the picture are written anew from all that are kept.
"""

import json
import pathlib
import tomllib

import common
import tasks

from text_classification import report
from text_classification.console import InputError, Parser, choose_backend, quiet_stderr, run
from text_classification.downloads import MINILM, fetch

CONFIGS = pathlib.Path(__file__).with_name("configs")
# A task is called hard where plain LoRA, tuned, still has more than this share of errors.
HARD = 0.15
# A sweep shows something of rates only where its best cell is right by so much more often than the
# most frequent class would be.
LEARNED = 0.01


def read_config(path):
    return tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def preset_of(config):
    return str(fetch(MINILM)) if config["preset"] == "minilm" else config["preset"]


def setting_of(config, task):
    """Returns what of the configuration tells one sweep of a task from another."""
    settings = {name: value for name, value in config.items() if not isinstance(value, dict)}
    length = config.get("sequence_lengths", {}).get(task)
    return settings if length is None else {**settings, "sequence_length": length}


def sweep_task(config, task, preset, init, storage, **overrides):
    """Sweeps one task with one initialisation; returns the result of `klp.tuning.sweep`.

    `overrides` are arguments of `sweep` that take the place of those of the configuration.
    """
    from keras_loraplus.tuning import text

    setting = setting_of(config, task.name)
    build = text.Builder(
        preset, len(task.classes), config["rank"], init=init, dtype=config["dtype"]
    )
    names = ("eta_a", "eta_b", "head_rate", "seeds", "epochs", "batch_size", "schedule")
    settings = {**{name: config[name] for name in names}, "storage": storage, **overrides}
    # The preset's name; the folder it stands for differs from machine to machine.
    about = {"preset": config["preset"], "setting": setting}
    return text.sweep_task(task, build, setting["sequence_length"], about=about, **settings)


def summary(result):
    """Returns what the text may claim of one sweep, as plain data."""
    cells = {arm: result.cells(arm) for arm in ("loraplus", "lora")}
    best = {arm: found[0] if found else None for arm, found in cells.items()}
    about = result.setup["about"]
    tests = {
        arm: [r["test_metrics"]["accuracy"] for r in result.test if r["arm"] == arm]
        for arm in cells
    }
    frequent = about["most_frequent_class"]
    picked = ("eta_a", "eta_b", "lr_ratio", "mean", "std", "values")
    plain = best["lora"]
    return {
        "task": about["task"],
        "init": about["init"],
        "hard": None if plain is None else bool(1 - plain["mean"] > HARD),
        "most_frequent_class": frequent,
        "learned": any(
            cell is not None and cell["mean"] > frequent + LEARNED for cell in best.values()
        ),
        **{arm: cell and {key: cell[key] for key in picked} for arm, cell in best.items()},
        "ratios_of_best_four": [cell["lr_ratio"] for cell in cells["loraplus"][:4]],
        "test_accuracy": tests,
        "cells": cells["loraplus"],
        "not_complete": sum(r["status"] != "complete" for r in result.records),
        "missing": result.missing,
        "trial_seconds": round(sum(r["seconds"] for r in (*result.records, *result.test))),
        "versions": result.versions,
    }


def draw(done, path):
    """Draws one map a sweep, and the ratios of the best four cells of all.

    Args:
        done: List of pairs (what `summary` returned, the result).
        path: Where to save the picture.
    """
    from keras_loraplus import tuning

    done = [(found, result) for found, result in done if found["cells"]]
    if not done:
        return
    pyplot = common.pyplot()
    columns = 3
    rows = -(-(len(done) + 1) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.9 * columns, 3.6 * rows), squeeze=False, layout="constrained"
    )
    maps, (last, *unused) = axes.flat[: len(done)], axes.flat[len(done) :]
    for axis, (found, result) in zip(maps, done, strict=True):
        tuning.plot_heatmap(result, ax=axis)
        nothing = "" if found["learned"] else ": nothing learned"
        axis.set_title(f"{found['task']}, init {found['init']}{nothing}", fontsize="medium")
        # One legend serves all maps.
        handles, labels = axis.get_legend_handles_labels()
        axis.get_legend().remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")
    # Of cells that are all as good as the most frequent class, none is a best one.
    results = {f"{f['task']}, {f['init']}": result for f, result in done if f["learned"]}
    if results:
        tuning.plot_ratio_distribution(results, ax=last)
        last.set_title("ratio of the best 4 cells of each seed", fontsize="medium")
        if unused:
            unused[0].legend(*last.get_legend_handles_labels(), fontsize="small", loc="upper left")
            last.get_legend().remove()
        else:
            last.set_ylim(top=1.5 * last.get_ylim()[1])  # room for the legend
    else:
        unused = [last, *unused]
    for axis in unused:
        axis.axis("off")
    seeds = len(done[0][1].seeds)
    figure.suptitle(
        f"LoRA+: validation accuracy over the rates of A and B, mean of {seeds} seeds",
        fontsize="medium",
    )
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=CONFIGS / "minilm.toml")
    parser.add_argument("--data", nargs="*", default=[], metavar="TASK=FOLDER")
    parser.add_argument("--tasks", nargs="+", help="some of the configuration's tasks")
    parser.add_argument("--storage", required=True, help="folder that the sweeps are kept in")
    parser.add_argument("--output", default=common.RESULTS / "glue", help="path without an ending")
    parser.add_argument(
        "--backend", default="torch", help="torch compiles nothing, a cell is short"
    )
    options = parser.parse_args(arguments)
    config = read_config(options.config)
    folders = dict(entry.partition("=")[::2] for entry in options.data)
    names = options.tasks or list(config["tasks"])
    unknown = [name for name in names if name not in config["tasks"]]
    if unknown:
        raise InputError(f"no tasks of {options.config}: {', '.join(unknown)}")
    choose_backend(options.backend)
    with quiet_stderr():
        import keras_loraplus as _  # noqa: F401
    folder = pathlib.Path(options.output)
    kept = {
        (name, init): common.read_kept(folder / f"{name}_{init}.json", setting_of(config, name))
        for name, inits in config["tasks"].items()
        for init in inits
    }
    to_run = [key for key, result in kept.items() if result is None and key[0] in names]
    missing = sorted({name for name, _ in to_run} - {"r8", *folders})
    if missing:
        raise InputError(
            f"--data names no folder for {', '.join(missing)}: --data {missing[0]}=DIR"
        )
    storage = pathlib.Path(options.storage)
    for path in (storage, folder):
        path.mkdir(parents=True, exist_ok=True)
    limits = {key: config[key] for key in ("train_texts", "validation_texts", "test_texts")}
    for name, init in to_run:
        print(f"{name}, init {init}", flush=True)
        task = tasks.load(name, folders.get(name), **limits)
        found = sweep_task(config, task, preset_of(config), init, storage / f"{name}_{init}.db")
        found.save(folder / f"{name}_{init}.json")
        kept[name, init] = found
        write(options.output, config, [result for result in kept.values() if result])
    if not to_run:
        write(options.output, config, [result for result in kept.values() if result])


def write(output, config, results):
    """Writes the summary of all results as JSON, and the picture."""
    done = [(summary(result), result) for result in results]
    summaries = [found for found, _ in done]
    content = {"setting": config, "sweeps": summaries}
    report.write_json(json.loads(json.dumps(content)), f"{output}.json")
    draw(done, f"{output}.png")
    for found in summaries:
        plus, plain = found["loraplus"], found["lora"]
        if plus and plain:
            print(
                f"{found['task']}, {found['init']}: best LoRA+ {plus['mean']:.3f} at ratio "
                f"{plus['lr_ratio']:g}, best LoRA {plain['mean']:.3f}"
            )


if __name__ == "__main__":
    run(main)
