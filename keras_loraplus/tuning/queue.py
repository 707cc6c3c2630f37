"""Work that is done once, however many processes do it and whichever of them die.

Optuna's storage holds the work: one study a stage, one trial a piece of work, which is named by a
key in the trial's user attributes. What Optuna leaves open is settled here.

- Its `GridSampler` hands a cell that is still running to the next worker as well. Here every piece
  is put in as a waiting trial, and a worker takes one by setting it to running.
- In SQLite, reading "waiting" and writing "running" are two transactions in Optuna's storage, since
  SQLite knows no `FOR UPDATE`; two workers can then take one trial. `open_storage` makes every
  transaction begin with the write lock.
- Two workers that start together may both put the same piece in. Of all trials of a piece that
  count, the one with the lowest number is worked on, and the others are dropped when taken.
- A trial whose worker died is failed by Optuna once its heartbeat is old. It carries no result of
  ours, does not count, and its piece is put in again, up to a number of times.
"""

import contextlib
import copy
import datetime
import functools
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

RECORDS = "records"
_KEY, _STATUS, _WORKER = "key", "status", "worker"
_DROPPED, _INTERRUPTED = "dropped", "interrupted"
_OPENING_TRIES = 20


class Queue:
    """The pieces of one stage.

    Args:
        study: The Optuna study that holds them.
        pieces: What `run` gets, by a key that is the same in every process and run.
        run: Function of a piece and the Optuna trial. It returns a status (`"complete"`,
            `"pruned"`, `"diverged"` or `"failed"`), a value for the sampler (None unless
            complete) and records for JSON.
        heartbeat: Seconds between two signs of life of a worker.
        max_deaths: How often a piece may take its worker with it before it counts as failed.
    """

    def __init__(
        self,
        study: Any,
        pieces: Mapping[str, Any],
        run: Callable[[Any, Any], tuple[str, float | None, list[dict[str, Any]]]],
        heartbeat: int,
        max_deaths: int,
    ) -> None:
        self.study = study
        self.pieces = dict(pieces)
        self._run = run
        self._heartbeat = heartbeat
        self._max_deaths = max_deaths

    def forgive_failures(self) -> None:
        """Makes failed pieces count as not done, so that they are put in again."""
        failed = [t.number for t in self._trials() if t.user_attrs.get(_STATUS) == "failed"]
        known = self.study.user_attrs.get("forgiven", [])
        self.study.set_user_attr("forgiven", sorted({*known, *failed}))

    def finished(self) -> dict[str, Any]:
        """Returns the trials whose result stands, by key; None for a piece that only ever died."""
        from optuna.trial import TrialState

        standing = self._standing()
        done = {
            key: trial
            for key, trial in standing.items()
            if trial is not None
            and trial.state not in (TrialState.WAITING, TrialState.RUNNING)
            and key in self.pieces
        }
        lost = [key for key, trial in standing.items() if trial is None and key in self.pieces]
        return {**done, **dict.fromkeys(lost)}

    def work(self, on_progress: Callable[[], None]) -> None:
        """Works until every piece is finished, by this process or by others.

        Args:
            on_progress: Called when this process has finished a piece, and while it waits.
        """
        from optuna import exceptions

        while True:
            self._fail_the_dead()
            self._put_in_missing()
            on_progress()
            if len(self.finished()) == len(self.pieces):
                return
            if not self._is_any_waiting():
                # All that is left is in the hands of other workers, one of which may die.
                time.sleep(min(1.0, self._heartbeat / 2))
                continue
            try:
                self.study.optimize(self._objective, n_trials=1, catch=(_PieceFailed,))
            except (exceptions.UpdateFinishedTrialError, ValueError) as error:
                # This process stood still for so long that its piece was given to another.
                if not _was_finished_by_another(error):
                    raise

    def _objective(self, trial: Any) -> float:
        from optuna import exceptions

        storage, number = self.study._storage, trial.number
        if hasattr(storage, "record_heartbeat"):
            # Before anything else: a trial that runs without ever a heartbeat is never failed.
            storage.record_heartbeat(trial._trial_id)
        trial.set_user_attr(_WORKER, os.getpid())
        key = trial.user_attrs.get(_KEY)
        standing = self._standing().get(key)
        if key not in self.pieces or (standing is not None and standing.number != number):
            trial.set_user_attr(_STATUS, _DROPPED)
            raise exceptions.TrialPruned("another trial does this piece of work")
        try:
            status, value, records = self._run(self.pieces[key], trial)
        except KeyboardInterrupt:
            trial.set_user_attr(_STATUS, _INTERRUPTED)
            raise
        trial.set_user_attr(RECORDS, records)
        trial.set_user_attr(_STATUS, status)
        if status == "complete":
            assert value is not None
            return value
        if status == "failed":
            raise _PieceFailed("see the trial's records")
        # Samplers learn from a pruned trial that this is no good place, and nothing from a failed.
        raise exceptions.TrialPruned(status)

    def _trials(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    def _standing(self) -> dict[str, Any]:
        """Returns the trial that counts for each key; None where all of its workers died."""
        from optuna.trial import TrialState

        forgiven = set(self.study.user_attrs.get("forgiven", []))
        standing: dict[str, Any] = {}
        deaths: dict[str, int] = {}
        for trial in sorted(self._trials(), key=lambda trial: trial.number):
            key, status = trial.user_attrs.get(_KEY), trial.user_attrs.get(_STATUS)
            if key is None or status in (_DROPPED, _INTERRUPTED) or trial.number in forgiven:
                continue
            if trial.state == TrialState.FAIL and status != "failed":
                deaths[key] = deaths.get(key, 0) + 1
            else:
                standing.setdefault(key, trial)
        for key, count in deaths.items():
            if count > self._max_deaths:
                standing.setdefault(key, None)
        return standing

    def _put_in_missing(self) -> None:
        from optuna.trial import TrialState, create_trial

        standing = self._standing()
        for key, piece in self.pieces.items():
            if key not in standing:
                params = piece.get("params", {})
                self.study.add_trial(
                    create_trial(
                        state=TrialState.WAITING,
                        params=params,
                        distributions={name: _only(value) for name, value in params.items()},
                        user_attrs={_KEY: key},
                    )
                )

    def _is_any_waiting(self) -> bool:
        from optuna.trial import TrialState

        return bool(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _fail_the_dead(self) -> None:
        """Fails trials of dead workers, as `optimize` does, and those that died before it could."""
        import optuna
        from optuna.trial import TrialState

        if not hasattr(self.study._storage, "get_heartbeat_interval"):
            return
        if self.study._storage.get_heartbeat_interval() is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        limit = datetime.timedelta(seconds=6 * self._heartbeat)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if _WORKER not in trial.user_attrs and trial.datetime_start is not None:
                if datetime.datetime.now() - trial.datetime_start > limit:
                    self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


class _PieceFailed(Exception):
    """The piece's own failure, which is recorded and not raised."""


def _was_finished_by_another(error: Exception) -> bool:
    from optuna import exceptions

    if isinstance(error, exceptions.UpdateFinishedTrialError):
        return True
    return str(error).startswith("Cannot tell a ")


def _only(value: Any) -> Any:
    from optuna.distributions import FloatDistribution, IntDistribution

    kind = IntDistribution if isinstance(value, int) else FloatDistribution
    return kind(value, value)


@contextlib.contextmanager
def open_storage(storage: Any, heartbeat: int) -> Iterator[Any]:
    """Gives an Optuna storage; the database's connections are closed in the end.

    Args:
        storage: None (memory, this process only), the path of an SQLite file, the URL of a
            database, or an Optuna storage, which is used as it is.
        heartbeat: Seconds between two signs of life of a worker. A worker counts as dead after
            three times as long without one.
    """
    import optuna

    if storage is None:
        yield optuna.storages.InMemoryStorage()
    elif not isinstance(storage, (str, os.PathLike)):
        yield storage
    else:
        opened = _open_database(os.fspath(storage), heartbeat)
        try:
            yield opened
        finally:
            opened.remove_session()
            opened.engine.dispose()


def _open_database(url: str, heartbeat: int) -> Any:
    import optuna

    if "://" not in url:
        os.makedirs(os.path.dirname(os.path.abspath(url)), exist_ok=True)
        url = f"sqlite:///{os.path.abspath(url)}"
    # Waits for the lock as long as a busy disk may need.
    options = {"connect_args": {"timeout": 120}} if url.startswith("sqlite:") else {}
    make = functools.partial(
        optuna.storages.RDBStorage,
        url,
        engine_kwargs=options,
        heartbeat_interval=heartbeat,
        grace_period=3 * heartbeat,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        opened = _retry(make) if url.startswith("sqlite:") else make()
    if url.startswith("sqlite:"):
        _lock_from_the_start(opened.engine)
    return opened


def _retry(make: Callable[[], Any]) -> Any:
    """Calls until no other process creates the same tables at the same time."""
    from sqlalchemy import exc

    for last in [False] * (_OPENING_TRIES - 1) + [True]:
        try:
            return make()
        except (exc.OperationalError, exc.IntegrityError, AssertionError):
            if last:
                raise
            time.sleep(random.uniform(0.05, 0.5))
    raise AssertionError("not reached")


def _lock_from_the_start(engine: Any) -> None:
    """Makes each transaction take SQLite's write lock before it reads.

    `isolation_level = None` keeps Python's driver from opening transactions by itself, which it
    does only before the first write (SQLAlchemy documents this pair of events; checked on 2.1.9).
    """
    from sqlalchemy import event

    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    def begun(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begun)
    # Connections that were opened before had no such start.
    engine.dispose()


def open_study(storage: Any, name: str, direction: str, sampler: Any, pruner: Any) -> Any:
    """Returns the study of that name, created if there is none."""
    import optuna

    return optuna.create_study(
        storage=storage,
        study_name=name,
        direction=direction,
        # Some samplers remember the study they were first used in.
        sampler=copy.deepcopy(sampler),
        pruner=copy.deepcopy(pruner) or optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


def results(finished: Mapping[str, Any], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the records of finished pieces, in the order of the keys."""
    return [
        record
        for key in keys
        if finished.get(key) is not None
        for record in finished[key].user_attrs.get(RECORDS, [])
    ]
