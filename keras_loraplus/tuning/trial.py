"""One cell of a sweep: build, train, measure on the validation data."""

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_loraplus.tuning.cells import Cell

_SECONDS_BETWEEN_COLLECTIONS = 5.0
_collected = 0.0


class Diverged(Exception):
    """A loss or metric is not finite."""


class Pruned(Exception):
    """The pruner has seen enough of this cell."""


@dataclasses.dataclass
class Reporter:
    """Takes the monitored metric of the validation data during training.

    Args:
        monitor: Name of the metric.
        should_stop: Function of step and value that tells whether to give the cell up.
        steps: Steps at which it was called.
        values: The values it was called with.
    """

    monitor: str
    should_stop: Callable[[int, float], bool]
    steps: list[int] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)

    def __call__(self, step: int, value: float) -> None:
        """Keeps a value; ends the cell if it is not finite, or if the pruner says so."""
        value = float(value)
        if not math.isfinite(value):
            raise Diverged(f"{self.monitor} is {value} after {step} steps")
        self.steps.append(int(step))
        self.values.append(value)
        if self.should_stop(int(step), value):
            raise Pruned(f"given up after {step} steps")


@dataclasses.dataclass
class Plan:
    """How each cell is trained and measured; the fields are arguments of `sweep`."""

    build: Callable[[Cell], Any]
    train: Any
    validation: Any
    monitor: str
    loss: Any = None
    metrics: Sequence[Any] = ()
    epochs: int = 1
    batch_size: int | None = None
    evaluate_every: int | None = None
    schedule: Any = "constant"
    head: Any = None
    optimizer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def run(
        self,
        cell: Cell,
        should_stop: Callable[[int, float], bool],
        test: Any = None,
    ) -> dict[str, Any]:
        """Returns the record of one cell; what goes wrong in it is in the record.

        Args:
            cell: The cell.
            should_stop: Function of step and value, as of `Reporter`.
            test: The test data, or None; measured after the training, as `test_metrics`.
        """
        start = time.perf_counter()
        reporter = Reporter(self.monitor, should_stop)
        record: dict[str, Any] = {**cell.as_dict(), "status": "complete", "value": None}
        record |= {"metrics": {}, "error": None}
        try:
            metrics, model = self._train(cell, reporter)
            bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
            if self.monitor not in metrics:
                raise ValueError(
                    f"The metrics hold no {self.monitor!r}, which `monitor` names. They hold: "
                    f"{sorted(metrics)}"
                )
            if bad:
                raise Diverged(", ".join(f"{name} is {value}" for name, value in bad.items()))
            record |= {"metrics": metrics, "value": metrics[self.monitor]}
            if test is not None:
                measured = self._evaluate(model, test)
                # JSON has no NaN.
                finite = {n: v if math.isfinite(v) else None for n, v in measured.items()}
                record["test_metrics"] = finite
        except Diverged as error:
            record |= {"status": "diverged", "error": str(error)}
        except Pruned as error:
            record |= {"status": "pruned", "error": str(error)}
        except Exception as error:  # whatever a user's function raises: the sweep goes on
            record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
        record["curve"] = {"steps": reporter.steps, "values": reporter.values}
        record["seconds"] = round(time.perf_counter() - start, 3)
        return record

    def _train(self, cell: Cell, reporter: Reporter) -> tuple[dict[str, float], Any]:
        _forget_models()
        keras.utils.set_random_seed(cell.seed)
        model = self.build(cell)
        if callable(self.train):
            metrics = self.train(model, cell, reporter)
            if not isinstance(metrics, Mapping):
                raise ValueError(
                    "`train` must return a dictionary of the metrics on the validation data. "
                    f"Received: {metrics!r}"
                )
            return {name: float(value) for name, value in metrics.items()}, model
        total = self._steps_an_epoch() * self.epochs
        options = dict(self.optimizer_options)
        optimizer = cell.optimizer(model, schedule=self._schedule(total), head=self.head, **options)
        model.compile(optimizer=optimizer, loss=self.loss, metrics=list(self.metrics))
        metrics = {}
        step = 0
        for part in self._parts(cell.seed):
            logs = self._fit(model, part)
            step += self._steps_in(part)
            if not math.isfinite(logs["loss"]):
                raise Diverged(f"the training loss is {logs['loss']} after {step} steps")
            metrics = {**self._evaluate(model, self.validation), "train_loss": logs["loss"]}
            reporter(step, metrics[self.monitor])
        return metrics, model

    def _schedule(self, steps: int) -> Callable | None:
        if self.schedule == "constant":
            return None
        if self.schedule == "linear":
            decay = keras.optimizers.schedules.PolynomialDecay
            return lambda rate: decay(rate, max(1, steps), 0.0)
        return lambda rate: self.schedule(rate, steps)

    def _parts(self, seed: int) -> Any:
        """Yields what to fit between two evaluations: rows of arrays, or a dataset's epoch."""
        if not is_arrays(self.train):
            for _ in range(self.epochs):
                yield self.train
            return
        rng = np.random.default_rng(seed)
        batch = self.batch_size or 32
        rows = (self.evaluate_every or self._steps_an_epoch()) * batch
        for _ in range(self.epochs):
            # The same order for every cell of a seed, whatever the backend and the method.
            order = rng.permutation(count_rows(self.train))
            for start in range(0, len(order), rows):
                yield take(self.train, order[start : start + rows])

    def _steps_an_epoch(self) -> int:
        return self._steps_in(self.train)

    def _steps_in(self, part: Any) -> int:
        if is_arrays(part):
            return -(-count_rows(part) // (self.batch_size or 32))
        try:
            return len(part)
        except TypeError as error:
            raise ValueError(
                "The training data must be arrays `(x, y)` or a dataset with a length, so that "
                "steps can be counted."
            ) from error

    def _fit(self, model: Any, part: Any) -> dict[str, float]:
        if is_arrays(part):
            batch = self.batch_size or 32
            history = model.fit(**_named(part), batch_size=batch, shuffle=False, verbose=0)
        else:
            history = model.fit(part, verbose=0)
        return {name: float(values[-1]) for name, values in history.history.items()}

    def _evaluate(self, model: Any, data: Any) -> dict[str, float]:
        if callable(data):
            return {name: float(value) for name, value in data(model).items()}
        if is_arrays(data):
            options = {"batch_size": self.batch_size, "verbose": 0, "return_dict": True}
            logs = model.evaluate(**_named(data), **options)
        else:
            logs = model.evaluate(data, verbose=0, return_dict=True)
        return {name: float(value) for name, value in logs.items()}


def _forget_models() -> None:
    """Frees the models of earlier cells: automatic names begin anew, and memory is given back.

    A collection takes some tenths of a second, more than a tiny model's training, whose memory
    does not matter: there is one every few seconds at most.
    """
    global _collected
    keras.utils.clear_session(free_memory=False)
    if time.monotonic() - _collected > _SECONDS_BETWEEN_COLLECTIONS:
        gc.collect()
        _collected = time.monotonic()


def is_arrays(data: Any) -> bool:
    """Whether data are `(x, y)` or `(x, y, sample_weight)`."""
    return isinstance(data, (tuple, list)) and len(data) in (2, 3)


def _named(data: Any) -> dict[str, Any]:
    """Returns arrays by the names of Keras's arguments; the third is not the third argument."""
    return dict(zip(("x", "y", "sample_weight"), data, strict=False))


def count_rows(data: Any) -> int:
    """Returns the number of rows of arrays."""
    return len(keras.tree.flatten(data)[0])


def take(data: Any, rows: Any) -> Any:
    """Returns these rows of arrays."""
    return keras.tree.map_structure(lambda array: np.asarray(array)[rows], tuple(data))
