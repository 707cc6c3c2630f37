"""docs/versions.md is made from what pytest itself counted, and every environment has its row."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

SUITE = """
import pytest

@pytest.mark.parametrize("i", range(3))
def test_passes(i): pass

def test_fails(): assert 1 == 2

@pytest.fixture
def broken(): raise RuntimeError("no such thing")

def test_has_an_error(broken): pass

@pytest.mark.skip(reason="why")
def test_is_skipped(): pass
"""

ENTRY = {
    "date": "2026-11-25",
    "backend": "jax",
    "versions": {"python": "3.13.0", "keras": "3.15.1", "keras-hub": "0.32.0", "jax": "0.10.2"},
    "left out": ["tests/x.py"],
    "passed": 5,
    "failed": 1,
    "skipped": 2,
    "failures": {"tests.y::test_z": "AssertionError: 1 != 2"},
}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location(
        "versions_table", ROOT / "tools/versions_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(tmp_path):
    (tmp_path / "test_it.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=results.xml"]
    finished = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True)
    assert finished.returncode == 1, finished.stdout
    return tmp_path / "results.xml"


def test_counts_are_those_of_pytest(tool, results):
    found = tool.counts(results)
    assert found == {
        "passed": 3,
        "failed": 2,
        "skipped": 1,
        "failures": {
            "test_it::test_fails": "assert 1 == 2",
            "test_it::test_has_an_error": 'failed on setup with "RuntimeError: no such thing"',
        },
    }


def test_a_run_with_failures_is_recorded_and_fails(tool, results, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "RESULTS", tmp_path / "kept")
    monkeypatch.setattr(tool, "TABLE", tmp_path / "versions.md")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setattr(sys, "argv", ["versions_table.py", "keras-nightly", str(results)])
    assert tool.main() == 1
    entry = json.loads((tmp_path / "kept" / "keras-nightly.json").read_text())
    assert (entry["passed"], entry["failed"], entry["backend"]) == (3, 2, "torch")
    assert entry["versions"]["keras"] and entry["versions"]["python"]
    assert "fails `test_it::test_fails`: assert 1 == 2" in (tmp_path / "versions.md").read_text()


def test_a_row_says_what_ran_and_a_missing_run_is_named(tool):
    page = tool.table({"python-3.13": ENTRY})
    row = "| python-3.13 | 3.13.0 | 3.15.1 | 0.32.0 | jax 0.10.2 | 5 | 1 | 2 | 2026-11-25 |"
    assert row in page.splitlines()
    assert "| keras-oldest | not run yet |" in page
    assert "- python-3.13 leaves out what needs torch or PEFT: `tests/x.py`." in page
    assert "- python-3.13 fails `tests.y::test_z`: AssertionError: 1 != 2" in page


def test_every_environment_has_a_row(tool):
    listed = subprocess.run(
        [sys.executable, "-m", "nox", "--list", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    sessions = {session["session"] for session in json.loads(listed.stdout)}
    assert sessions == {*tool.SESSIONS, "interpreters"}


def test_declared_pythons_are_those_of_the_table(tool):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = re.findall(r":: Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    oldest = project["requires-python"].removeprefix(">=")
    assert declared == [oldest, *(s[7:] for s in tool.SESSIONS if s.startswith("python-"))]


def test_what_is_left_out_exists():
    """A path that pytest does not know would leave out nothing, and say nothing."""
    source = (ROOT / "noxfile.py").read_text()
    left_out = re.findall(r'"(tests/[^"]+)"', source)
    assert len(left_out) > 3
    for test in left_out:
        path, _, name = test.partition("::")
        assert (ROOT / path).exists(), test
        assert not name or f"def {name}(" in (ROOT / path).read_text(), test
