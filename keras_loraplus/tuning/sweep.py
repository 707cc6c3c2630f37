"""A sweep over the learning rates of LoRA+ and of what it is compared with."""

import dataclasses
import json
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import keras

from keras_loraplus.tuning import queue
from keras_loraplus.tuning.cells import Axes, Cell
from keras_loraplus.tuning.progress import Progress
from keras_loraplus.tuning.result import SweepResult
from keras_loraplus.tuning.spec import Spec, check

# Steps of the seeds of one sampled trial are kept apart, since Optuna keeps one value a step.
_STEPS_OF_A_SEED = 10**7


def sweep(
    build: Callable[[Cell], Any],
    train: Any,
    validation: Any = None,
    *,
    eta_a: Any,
    eta_b: Any = None,
    lr_ratio: Any = None,
    head_rate: Any = None,
    head_ratio: Any = None,
    lora: Any = True,
    full: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    monitor: str = "accuracy",
    mode: str | None = None,
    loss: Any = None,
    metrics: Sequence[Any] = (),
    epochs: int = 1,
    batch_size: int | None = None,
    evaluate_every: int | None = None,
    schedule: Any = "constant",
    head: Any = None,
    optimizer_options: Mapping[str, Any] | None = None,
    test: Any = None,
    about: Mapping[str, Any] | None = None,
    storage: Any = None,
    name: str = "sweep",
    n_workers: int = 1,
    sampler: Any = None,
    n_trials: int | None = None,
    pruner: Any = None,
    heartbeat: int = 30,
    max_deaths: int = 2,
    retry_failed: bool = False,
    progress: bool = True,
) -> SweepResult:
    """Tries learning rates and selects the best of each method by the validation data.

    Every arm (LoRA+, plain LoRA, full fine-tuning) is tuned, since a tuned method beats an untuned
    one whatever the two are. LoRA+ is tried at every pair of `eta_a` with `eta_b`, or with `eta_a *
    lr_ratio`; plain LoRA at as many single rates for A and B, by default spread evenly in the
    logarithm from the lowest to the highest rate of either side. Each cell is trained once a seed.

    The head's rate is an axis or a constant that is given, never silently that of A: `head_rate` is
    the rate itself, `head_ratio` the rate over `eta_a`. Neither says that A and B are all that
    trains; if they are not, every cell fails and says so.

    With a `storage` the sweep goes on where it stopped, and any number of processes, on one machine
    or several, work on it: start the same program again with the same `storage` and `name`. Each
    cell is trained once. Cells that a dead worker had are taken up by the others. A cell that fails
    or becomes non-finite is recorded as such, and the sweep goes on.

    Args:
        build: Function of a `klp.tuning.Cell` that returns a built model, adapted unless `cell.arm`
            is `"full"`. The random seed has been set to `cell.seed`. It may look at the arm, for
            example for `init=`, but leaves the rates to the sweep.
        train: Training data, or a function. Data are arrays `(x, y)`, shuffled by the seed, or a
            dataset with a length; the model is compiled with `cell.optimizer(...)` and fitted. A
            function of `(model, cell, report)` trains the model itself and returns a dictionary of
            the metrics on validation data; `report(step, value)` of the monitored metric on the way
            makes the learning curve, ends a cell that is not finite, and asks the pruner.
        validation: Validation data as `(x, y)`, a dataset, or a function of the model that returns
            metrics. Not used if `train` is a function.
        eta_a: Rates of A: a number, a list, or with a `sampler` an Optuna distribution.
        eta_b: Rates of B, likewise. This or `lr_ratio`.
        lr_ratio: Rates of B over those of A, likewise.
        head_rate: Rates of the head, likewise: a number is a constant, a list an axis.
        head_ratio: Rates of the head over `eta_a`, likewise.
        lora: True for plain LoRA as above, False to leave it out, or a dictionary with `eta_a` and
            optionally `head_rate` or `head_ratio`, with as many cells as LoRA+ has.
        full: None, or a dictionary as for `lora`: rates for full fine-tuning.
        seeds: Seeds that every cell is tried with.
        monitor: The metric of the validation data to select by, as `evaluate` names it.
        mode: `"max"` or `"min"`. None: told from the metric's name (`loss`, `accuracy`, ...).
        loss: As in `compile`.
        metrics: As in `compile`.
        epochs: Epochs a cell.
        batch_size: As in `fit`.
        evaluate_every: Steps between two looks at the validation data; None: once an epoch. Arrays
            only.
        schedule: `"constant"`, `"linear"` (to zero over the training), or a function of a rate and
            the number of steps that returns a `learning_rate`.
        head: Which variables are the head's, as in `Cell.optimizer`.
        optimizer_options: Further arguments of `LoRAPlusAdamW`, such as `weight_decay`.
        test: Test data, in the forms of `validation`. Read after all cells are finished, for the
            selected cell of each arm only, which is trained again with each seed; once, also if the
            sweep is continued later.
        about: What else to write into the result, for example the names of model and data.
        storage: None (memory), the path of an SQLite file, a database URL, or an Optuna storage.
            SQLite is for one machine.
        name: Name of the sweep in the storage.
        n_workers: Number of processes. With more than one, `build` and the data are pickled.
        sampler: An Optuna sampler in place of the grid; it gets `n_trials` trials an arm, each
            trained with every seed and judged by the mean.
        n_trials: With a `sampler`, the number of trials an arm.
        pruner: An Optuna pruner, which may end cells early; a pruned cell is not selected.
        heartbeat: Seconds between two signs of life of a worker in a database. After three times
            as long without one, its cell is given to another.
        max_deaths: A cell whose worker died more often than this is recorded as failed.
        retry_failed: Whether to try cells again that an earlier run recorded as failed.
        progress: Whether to show a progress bar, with the best cell so far.

    Returns:
        A `SweepResult`: `records`, `selected(arm)`, `to_pandas()`, `save(path)`.

    Raises:
        ImportError: If Optuna is not installed.
        ValueError: If an argument is not as above, or the storage holds a sweep of this name that
            trained its cells in another way.
        RuntimeError: If every cell failed; the message holds the first error.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
        >>> y = (x[:, 0] > 0).astype("int32")
        >>> def build(cell):
        ...     hidden = keras.layers.Dense(8, activation="tanh")
        ...     model = keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(2)])
        ...     if cell.arm != "full":
        ...         klp.enable_lora_plus(model, rank=2, init="loraplus")
        ...     return model
        >>> result = klp.tuning.sweep(
        ...     build, (x[:48], y[:48]), (x[48:], y[48:]), eta_a=[1e-3, 1e-2], lr_ratio=[8.0],
        ...     head_rate=1e-2, monitor="loss", metrics=["accuracy"], progress=False,
        ...     loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> [(r["arm"], r["eta_a"], r["eta_b"], r["status"]) for r in result.records][:2]
        [('loraplus', 0.001, 0.008, 'complete'), ('loraplus', 0.01, 0.08, 'complete')]
        >>> [r["eta_a"] for r in result.records if r["arm"] == "lora"]
        [0.001, 0.08]

    Source: the grids of [LoRA+](https://arxiv.org/abs/2402.12354), figures 2 to 4.
    """
    arguments = dict(locals())
    _import_optuna()
    spec = check(arguments)
    if n_workers == 1:
        return _work(spec)
    return _work_together(arguments, spec)


def _import_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError("A sweep needs Optuna: pip install 'keras-loraplus[tuning]'.") from error


def _work(spec: Spec) -> SweepResult:
    import optuna

    verbosity = optuna.logging.get_verbosity()
    # Its lines, one or more a trial, would tear the progress bar; the records say the same.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with queue.open_storage(spec["storage"], spec["heartbeat"]) as storage:
            return _work_in(spec, storage)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _work_in(spec: Spec, storage: Any) -> SweepResult:
    stages = [_stage(spec, storage, axes) for axes in spec.arms]
    if spec["retry_failed"]:
        for stage in stages:
            stage.forgive_failures()
    with Progress(sum(len(s.pieces) for s in stages), spec.plan.monitor, spec["progress"]) as bar:

        def show() -> None:
            result = _gather(spec, stages, [])
            bar.update(sum(len(stage.finished()) for stage in stages), result)

        for stage in stages:
            stage.work(show)
        result = _gather(spec, stages, [])
        if result.records and all(r["status"] == "failed" for r in result.records):
            raise RuntimeError(
                f"All {len(result.records)} trials failed. The first: {result.records[0]['error']}"
            )
        if spec["test"] is None:
            return result
        test = _test_stage(spec, storage, result)
        bar.grow(len(test.pieces))
        test.work(lambda: bar.update(result=result, also=len(test.finished())))
    return _gather(spec, stages, queue.results(test.finished(), list(test.pieces)))


def _stage(spec: Spec, storage: Any, axes: Axes) -> queue.Queue:
    study = queue.open_study(
        storage, f"{spec['name']}/{axes.arm}", spec.direction, spec["sampler"], spec["pruner"]
    )
    known = study.user_attrs.get("setup")
    if known is None:
        study.set_user_attr("setup", spec.setup)
    elif known != spec.setup:
        keys = [key for key in {*known, *spec.setup} if known.get(key) != spec.setup.get(key)]
        old, new = ({key: part.get(key) for key in sorted(keys)} for part in (known, spec.setup))
        raise ValueError(
            f"The storage holds a sweep named {spec['name']!r} that was trained in another way: "
            f"{old}; now: {new}. Give another `name`, or the same settings."
        )
    pieces: dict[str, dict[str, Any]]
    if spec["sampler"] is None:
        cells = [axes.cell(point, seed) for seed in spec.seeds for point in axes.points()]
        pieces = {_key(cell): {"cells": [cell], "params": _params(cell)} for cell in cells}
    else:
        pieces = {f"{axes.arm} {index}": {} for index in range(spec["n_trials"])}

    def run(piece: dict[str, Any], trial: Any) -> tuple[str, float | None, list[dict[str, Any]]]:
        cells = piece.get("cells")
        if cells is None:
            point = {key: _suggest(trial, key, values) for key, values in axes.items()}
            cells = [axes.cell(point, seed) for seed in spec.seeds]
        return _run_cells(spec, cells, trial)

    return queue.Queue(study, pieces, run, spec["heartbeat"], spec["max_deaths"])


def _run_cells(
    spec: Spec, cells: list[Cell], trial: Any
) -> tuple[str, float | None, list[dict[str, Any]]]:
    records = []
    for index, cell in enumerate(cells):
        offset = index * _STEPS_OF_A_SEED

        def should_stop(step: int, value: float, offset: int = offset) -> bool:
            trial.report(value, step + offset)
            return trial.should_prune()

        records.append(spec.plan.run(cell, should_stop))
        if records[-1]["status"] != "complete":
            return records[-1]["status"], None, records
    return "complete", sum(record["value"] for record in records) / len(records), records


def _suggest(trial: Any, name: str, axis: Any) -> float:
    if isinstance(axis, list):
        return trial.suggest_categorical(name, axis)
    return trial.suggest_float(name, axis.low, axis.high, step=axis.step, log=axis.log)


def _test_stage(spec: Spec, storage: Any, result: SweepResult) -> queue.Queue:
    """Returns the stage that trains the selected cells again and reads the test data."""
    pieces = {}
    for arm in result.arms:
        best = result.selected(arm)
        if best is not None:
            for seed in spec.seeds:
                rates = (best["eta_a"], best["eta_b"], best["head_rate"])
                # Named by arm and seed alone: the test data are read once, whatever comes after.
                cell = Cell(arm, *rates, seed)
                pieces[f"{arm} {seed}"] = {"cells": [cell], "params": _params(cell)}

    def run(piece: dict[str, Any], trial: Any) -> tuple[str, float | None, list[dict[str, Any]]]:
        record = spec.plan.run(piece["cells"][0], lambda step, value: False, spec["test"])
        return record["status"], record["value"], [record]

    study = queue.open_study(storage, f"{spec['name']}/test", spec.direction, None, None)
    return queue.Queue(study, pieces, run, spec["heartbeat"], spec["max_deaths"])


def _key(cell: Cell) -> str:
    return json.dumps([cell.arm, *cell.rates, cell.seed])


def _params(cell: Cell) -> dict[str, Any]:
    named = {**dataclasses.asdict(cell), "arm": None}
    return {key: value for key, value in named.items() if value is not None}


def _gather(spec: Spec, stages: Sequence[queue.Queue], test: list[dict[str, Any]]) -> SweepResult:
    records, missing = [], 0
    for stage in stages:
        finished = stage.finished()
        records += queue.results(finished, list(stage.pieces))
        records += [
            _died(cell, spec["max_deaths"])
            for key, trial in finished.items()
            if trial is None
            for cell in stage.pieces[key].get("cells", [])
        ]
        missing += len(stage.pieces) - len(finished)
    seeds = 1 if spec["sampler"] is None else len(spec.seeds)
    sampled = spec["n_trials"]
    return SweepResult(
        monitor=spec.plan.monitor,
        mode=spec.mode,
        seeds=spec.seeds,
        axes={axes.arm: axes.as_dict() for axes in spec.arms},
        budget={axes.arm: sampled or len(axes.points()) for axes in spec.arms},
        records=records,
        test=test,
        setup=spec.setup,
        versions=_versions(),
        missing=missing * seeds,
    )


def _died(cell: Cell, deaths: int) -> dict[str, Any]:
    error = f"The worker died each of {deaths + 1} times."
    return {
        **cell.as_dict(),
        **{"status": "failed", "value": None, "metrics": {}, "error": error},
        **{"curve": {"steps": [], "values": []}, "seconds": 0.0},
    }


def _versions() -> dict[str, Any]:
    backend = keras.backend.backend()
    found = {"python": platform.python_version(), "backend": backend}
    for package in ("keras", "keras-hub", "optuna", "numpy", backend, "keras-loraplus"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _work_together(arguments: dict[str, Any], spec: Spec) -> SweepResult:
    """Works in this process and others, which see the same storage."""
    if spec["storage"] is not None and not isinstance(spec["storage"], (str, os.PathLike)):
        raise ValueError("With `n_workers` > 1, `storage` must be None, a path or a URL.")
    with tempfile.TemporaryDirectory() as folder:
        shared = {**arguments, "storage": spec["storage"] or os.path.join(folder, "sweep.db")}
        # Backends do not survive a fork.
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=_work_quietly, args=(shared,))
            for _ in range(arguments["n_workers"] - 1)
        ]
        for process in others:
            process.start()
        try:
            return _work(check(shared))
        finally:
            for process in others:
                process.join()


def _work_quietly(arguments: dict[str, Any]) -> None:
    _work(check({**arguments, "progress": False, "retry_failed": False}))
