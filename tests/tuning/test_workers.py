"""Several processes on one storage, some of which die: each cell is trained once, none is lost."""

import collections
import os
import pathlib
import signal
import subprocess
import sys
import time

import doomed_program
import pytest
import sweep_program


@pytest.fixture
def start(tmp_path):
    """Starts a worker on one storage; those still running are killed at the end."""
    started = []

    def run(program=sweep_program, **environment):
        path = pathlib.Path(program.__file__)
        started.append(
            subprocess.Popen(
                [sys.executable, str(path), str(tmp_path / "sweep.db"), str(tmp_path / "log")],
                env={**os.environ, "PYTHONPATH": str(path.parents[2]), **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def lines(folder):
    """Returns the triples (event, process, cell) so far."""
    path = folder / "log"
    return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []


def cells(log, event, process=None):
    return [c for e, pid, c in log if e == event and process in (None, int(pid))]


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_a_killed_worker_loses_nothing_and_nothing_runs_twice(start, tmp_path):
    doomed = start(STUCK_AFTER="2")
    other = start()

    def is_stuck():
        assert doomed.poll() is None, doomed.communicate()[0]
        log = lines(tmp_path)
        return len(cells(log, "start", doomed.pid)) == 3 and cells(log, "end", other.pid)

    wait_for(is_stuck)
    doomed.send_signal(signal.SIGKILL)
    output, _ = other.communicate(timeout=300)
    assert other.returncode == 0, output
    assert f"records {sweep_program.CELLS}" in output

    log = lines(tmp_path)
    # Negative control: both did something, and the killed one had a cell in its hands.
    assert len(cells(log, "end", doomed.pid)) == 2
    (unfinished,) = set(cells(log, "start", doomed.pid)) - set(cells(log, "end", doomed.pid))
    ends = collections.Counter(cells(log, "end"))
    starts = collections.Counter(cells(log, "start"))
    assert len(ends) == sweep_program.CELLS
    assert set(ends.values()) == {1}
    assert {cell: count for cell, count in starts.items() if count > 1} == {unfinished: 2}

    # Continued in a third process, which is this one: all is done, and nothing is trained.
    result = sweep_program.run(str(tmp_path / "sweep.db"), str(tmp_path / "log"))
    assert lines(tmp_path) == log
    assert len(result.records) == sweep_program.CELLS and result.missing == 0
    assert {record["status"] for record in result.records} == {"complete"}
    assert result.selected("loraplus")["eta_a"] == 1e-3


def test_the_workers_that_a_sweep_starts_share_its_cells(tmp_path):
    result = sweep_program.run(None, str(tmp_path / "log"), n_workers=2)
    log = lines(tmp_path)
    assert len({pid for _, pid, _ in log}) == 2
    assert str(os.getpid()) in {pid for _, pid, _ in log}
    ends = collections.Counter(cells(log, "end"))
    assert len(ends) == sweep_program.CELLS and set(ends.values()) == {1}
    assert len(result.records) == sweep_program.CELLS and result.missing == 0
    assert {record["status"] for record in result.records} == {"complete"}
    assert result.selected("loraplus")["eta_b"] == 1e-2


def test_a_cell_that_takes_its_workers_with_it_is_given_up(start, tmp_path):
    doomed = [start(doomed_program) for _ in range(2)]
    for process in doomed:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 7, output
    # Two workers are dead, one more than `max_deaths`: this process need not try.
    result = doomed_program.run(str(tmp_path / "sweep.db"), str(tmp_path / "log"), max_deaths=1)
    log = lines(tmp_path)
    dead = f"loraplus:{doomed_program.DOOMED:g}:{8 * doomed_program.DOOMED:g}:0"
    counts = collections.Counter(cells(log, "start"))
    assert counts.pop(dead) == 2
    assert len(counts) == len(doomed_program.RATES) - 1 and set(counts.values()) == {1}
    records = {record["eta_a"]: record for record in result.records}
    assert set(records) == set(doomed_program.RATES) and result.missing == 0
    given_up = records.pop(doomed_program.DOOMED)
    assert given_up["status"] == "failed" and "died each of 2 times" in given_up["error"]
    assert {record["status"] for record in records.values()} == {"complete"}
