"""Two processes on one storage, one of which is killed: each cell is trained once, none is lost."""

import collections
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import keras_loraplus as klp

PROGRAM = pathlib.Path(__file__).with_name("sweep_program.py")
STUCK = "loraplus:0.001:0.01:0"
CELLS = 2 * 6 * 2  # arms, pairs, seeds


@pytest.fixture
def start(tmp_path):
    """Starts a worker on one storage; those still running are killed at the end."""
    started = []

    def run(number, **environment):
        root = str(PROGRAM.parents[2])
        arguments = [str(tmp_path / "sweep.db"), str(tmp_path / "log"), result_of(tmp_path, number)]
        started.append(
            subprocess.Popen(
                [sys.executable, str(PROGRAM), *arguments],
                env={**os.environ, "PYTHONPATH": root, **environment},
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


def result_of(folder, number):
    return str(folder / f"result{number}.json")


def lines(folder):
    """Returns the triples (event, process, cell) so far."""
    path = folder / "log"
    return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def test_a_killed_worker_loses_nothing_and_nothing_runs_twice(start, tmp_path):
    doomed = start(1, STUCK_CELL=STUCK)
    other = start(2)
    wait_for(lambda: any(event == "start" and cell == STUCK for event, _, cell in lines(tmp_path)))
    owner = next(pid for event, pid, cell in lines(tmp_path) if cell == STUCK)
    if owner != str(doomed.pid):
        # The other took it: it is ordinary work there, and another death is to be arranged.
        doomed.send_signal(signal.SIGKILL)
    else:
        wait_for(lambda: sum(event == "end" for event, _, _ in lines(tmp_path)) >= 3)
        os.kill(doomed.pid, signal.SIGKILL)
    finish(other)
    log = lines(tmp_path)
    ends = collections.Counter(cell for event, _, cell in log if event == "end")
    starts = collections.Counter(cell for event, _, cell in log if event == "start")
    assert len(ends) == CELLS and set(ends.values()) == {1}
    # Only what the killed process had in its hands was started again.
    again = {cell: count for cell, count in starts.items() if count > 1}
    unfinished = {c for e, pid, c in log if e == "start" and pid == str(doomed.pid)} - {
        c for e, pid, c in log if e == "end" and pid == str(doomed.pid)
    }
    assert set(again) <= unfinished and set(again.values()) <= {2}

    result = klp.tuning.load(result_of(tmp_path, 2))
    assert len(result.records) == CELLS and result.missing == 0
    assert {record["status"] for record in result.records} == {"complete"}

    # A third run finds everything done and trains nothing.
    finish(start(3))
    assert lines(tmp_path) == log
    assert klp.tuning.load(result_of(tmp_path, 3)).records == result.records
