"""The suite on other versions of Keras and of Python, each in an environment of its own.

    nox                       everything; each run is recorded in docs/versions.md
    nox -s keras-nightly      one environment (`nox -l` lists them)
    nox -s python-3.13 -- tests/layers -k dense      a part of the suite, which is not recorded

The suite on the pinned versions is `make test`; here one package, or Python, is another.
"""

import os
import pathlib
import re
import subprocess
import tomllib

import nox

ROOT = pathlib.Path(__file__).parent
PYTHONS = ("3.12", "3.13")
# A missing interpreter fails its session; nox's own default is to skip it.
nox.options.error_on_missing_interpreters = True

EVERYTHING = "examples,tensorflow,jax,torch,peft,dev"
# torch's wheels bring gigabytes of CUDA libraries; on JAX only the comparisons with PEFT need it.
WITHOUT_TORCH = "hub,tuning,tensorflow,jax,dev"
NEEDS_TORCH = (
    "tests/adapters/peft",
    "tests/adapters/test_merged_exports.py::test_transformers_reads_a_merged_decoder",
    "tests/examples/test_export_peft.py",
    "tests/oracles/test_peft_trajectory.py",
)


def oldest_keras() -> str:
    """Returns the lower bound on Keras that pyproject.toml declares."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [re.fullmatch(r"keras>=([\d.]+)", line) for line in project["dependencies"]]
    (bound,) = filter(None, bounds)
    return bound[1]


def constraints(session: nox.Session, *but: str) -> str:
    """Writes constraints.txt without its pins of the packages `but`; returns the file's path."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.partition("==")[0] not in but]
    path = pathlib.Path(session.create_tmp()) / "constraints.txt"
    path.write_text("\n".join(kept) + "\n")
    return str(path)


def run_suite(session: nox.Session, backend: str, *left_out: str) -> None:
    """Runs the suite on a backend; a whole run, passed or failed, is recorded."""
    results = pathlib.Path(session.create_tmp()) / "results.xml"
    results.unlink(missing_ok=True)
    session.env.update(KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="2")
    suite = ["python", "-m", "pytest", "-q", f"--junitxml={results}"]
    # A module is not even imported when it is ignored; single tests can only be deselected.
    suite += [f"--{'deselect' if '::' in test else 'ignore'}={test}" for test in left_out]
    if session.posargs:
        session.run(*suite, *session.posargs)
        return
    # 1 means that tests failed, which is recorded too; the recorder then exits with 1.
    session.run(*suite, "-n", os.environ.get("WORKERS", "2"), success_codes=[0, 1])
    record = ["python", "tools/versions_table.py", session.name, str(results)]
    session.run(*record, *(f"--left-out={test}" for test in left_out))


@nox.session(python=False)
def interpreters(session: nox.Session) -> None:
    """Says which interpreters are missing, before the long sessions start."""
    missing = [version for version in PYTHONS if not runs(f"python{version}")]
    if missing:
        session.error(
            f"No interpreter on PATH for Python {' and '.join(missing)}. Install it, or put it on "
            "PATH (pyenv: export PYENV_VERSION=3.12.x:3.13.x, of what `pyenv versions` lists). "
            "A single session, as in `nox -s keras-nightly`, needs its own interpreter only."
        )


def runs(interpreter: str) -> bool:
    """Whether an interpreter starts: pyenv has stand-ins on PATH for ones that do not."""
    try:
        return subprocess.run([interpreter, "-c", ""], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@nox.session(name="keras-oldest")
def keras_oldest(session: nox.Session) -> None:
    """The oldest Keras that pyproject.toml allows, on torch."""
    pins = constraints(session, "keras")
    session.install("-c", pins, f"keras=={oldest_keras()}", "-e", f".[{EVERYTHING}]")
    run_suite(session, "torch")


@nox.session(name="keras-newest")
def keras_newest(session: nox.Session) -> None:
    """The newest releases of Keras and KerasHub, on torch."""
    pins = constraints(session, "keras", "keras-hub", "keras-nlp")
    session.install("--upgrade", "-c", pins, "keras", "keras-hub", "-e", f".[{EVERYTHING}]")
    run_suite(session, "torch")


@nox.session(name="keras-nightly")
def keras_nightly(session: nox.Session) -> None:
    """The nightly builds of Keras and KerasHub, on torch."""
    session.install("-c", "constraints.txt", "-e", f".[{EVERYTHING}]")
    # KerasHub 0.32.0 cannot be imported with the nightly Keras: `get_keras_mask` has moved.
    # The nightlies are packages of other names with the same folders, so the releases go first.
    session.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "keras", "keras-hub")
    session.install("--pre", "--no-deps", "--upgrade", "keras-nightly", "keras-hub-nightly")
    run_suite(session, "torch")


@nox.session(name="python", python=PYTHONS)
def python(session: nox.Session) -> None:
    """Another Python with the pinned versions, on JAX."""
    session.install("-c", "constraints.txt", "-e", f".[{WITHOUT_TORCH}]")
    run_suite(session, "jax", *NEEDS_TORCH)
