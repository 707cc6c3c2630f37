"""Records one environment's run of the suite, and writes docs/versions.md from all that are kept.

    python tools/versions_table.py keras-nightly results.xml     called by `nox`, in the environment
    python tools/versions_table.py --table                       the table alone

What a run found is kept in benchmarks/results/versions/<session>.json. Recording ends with exit
code 1 when a test failed or none passed.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "versions"
TABLE = ROOT / "docs" / "versions.md"
SESSIONS = ("keras-oldest", "keras-newest", "keras-nightly", "python-3.12", "python-3.13")
# A nightly build is a package of another name.
PACKAGES = {
    "keras": ("keras", "keras-nightly"),
    "keras-hub": ("keras-hub", "keras-hub-nightly"),
    "tensorflow": ("tensorflow",),
    "jax": ("jax",),
    "torch": ("torch",),
}

INTRODUCTION = """# Versions

Written by `tools/versions_table.py` from pytest's results; do not edit. `make test-versions` makes
an environment for each row and runs the suite in it (`noxfile.py`): the oldest Keras that
`pyproject.toml` allows, the newest release, the nightly build, and other versions of Python. The
pinned versions of `constraints.txt`, on which `make test` runs the suite on every backend, fill the
rest of each environment. The nightly Keras has the nightly KerasHub beside it: 0.32.0 imports
private names that have moved.
"""


def counts(results):
    """Reads pytest's JUnit file.

    Returns:
        How many tests there were of each outcome, and the names of those that failed, with the
        first line of the reason.
    """
    found = {"passed": 0, "failed": 0, "skipped": 0}
    failures = {}
    for case in xml.etree.ElementTree.parse(results).iter("testcase"):
        (problem,) = [e for e in case if e.tag in ("failure", "error")][:1] or (None,)
        if problem is not None:
            found["failed"] += 1
            name = f"{case.get('classname')}::{case.get('name')}"
            failures[name] = (problem.get("message") or "").splitlines()[:1]
        elif case.find("skipped") is not None:
            found["skipped"] += 1
        else:
            found["passed"] += 1
    return {**found, "failures": {name: "".join(text) for name, text in failures.items()}}


def versions():
    """Versions in this environment, None for what is not installed."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    found = {
        package: next((installed[name] for name in names if name in installed), None)
        for package, names in PACKAGES.items()
    }
    return {"python": platform.python_version(), **found}


def table(found):
    """Returns the page.

    Args:
        found: What the run of each session found, by the session's name.
    """
    lines = [
        "| environment | Python | Keras | KerasHub | backend | passed | failed | skipped | on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes = []
    for session in SESSIONS:
        entry = found.get(session)
        if entry is None:
            lines.append(f"| {session} | not run yet |" + " |" * 7)
            continue
        version = entry["versions"]
        backend = f"{entry['backend']} {version[entry['backend']]}"
        cells = [session, *(version[name] for name in ("python", "keras", "keras-hub")), backend]
        cells += [entry[name] for name in ("passed", "failed", "skipped", "date")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        if entry["left out"]:
            left_out = ", ".join(f"`{test}`" for test in entry["left out"])
            notes.append(f"- {session} leaves out what needs torch or PEFT: {left_out}.")
        notes += [
            f"- {session} fails `{test}`: {why}" for test, why in sorted(entry["failures"].items())
        ]
    return "\n".join([INTRODUCTION, *lines, "", *notes]).rstrip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("session", nargs="?", choices=SESSIONS, help="the environment's name")
    parser.add_argument("results", nargs="?", help="what pytest wrote for --junitxml")
    parser.add_argument("--left-out", action="append", default=[], help="a test that was not run")
    parser.add_argument("--table", action="store_true", help="record nothing, write the table")
    arguments = parser.parse_args()
    passed = True
    if not arguments.table:
        if not arguments.results:
            parser.error("give a session and its results, or --table")
        entry = {
            "date": datetime.date.today().isoformat(),
            "backend": os.environ["KERAS_BACKEND"],
            "versions": versions(),
            "left out": arguments.left_out,
            **counts(arguments.results),
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{arguments.session}.json"
        path.write_text(json.dumps(entry, indent=1) + "\n")
        passed = entry["passed"] > 0 and not entry["failed"]
    found = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    TABLE.write_text(table(found))
    print(f"wrote {TABLE.relative_to(ROOT)}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
