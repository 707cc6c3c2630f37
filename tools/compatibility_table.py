"""Writes docs/compatibility.md: every KerasHub backbone class, every check, every backend.

    KERAS_BACKEND=jax python tools/compatibility_table.py            all classes, then the table
    KERAS_BACKEND=torch python tools/compatibility_table.py Bert T5  classes with these in the name
    python tools/compatibility_table.py --table                      the table alone

What a run finds is kept in benchmarks/results/compatibility/<backend>.json, class by class, so that
an interrupted run goes on with `--missing`.
"""

import argparse
import json
import os
import pathlib
import sys
import warnings

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compatibility"
TABLE = ROOT / "docs" / "compatibility.md"
BACKENDS = ("jax", "tensorflow", "torch")
DEFAULT, ALL_LINEAR = "default", "all-linear"

INTRODUCTION = """# KerasHub backbones

Written by `tools/compatibility_table.py` from runs on {versions}; do not edit. Every backbone class
that KerasHub exports is made in a tiny random configuration (`tests/hub_cases`) and checked
(`tests/hub_backbones.py`), with the default targets and with `"all-linear"`:

- **enables**: `enable_lora_plus` works; no variable is listed twice or missing; what trains is A
  and B of every reported layer; matrices that layers hold themselves are in the report.
- **unchanged**: the outputs are those from before.
- **every path**: taking any one adapter away, with all others non-zero, changes the output.
- **trains**: two steps of `fit` move A and B of every adapted layer, and nothing else.
- **saves and loads**: a twin that loads the saved adapter has the same A, B and outputs.
- **merges**: the merged model has the same outputs and no A or B.

A cell says on which backends all is well: J is JAX, T TensorFlow, P PyTorch; a dot stands for a
backend on which the class was not run, and a number for a note below. Where a backbone has none of
the layers that KerasHub names by default, the default targets are those of `"all-linear"`, and
where it has no dense layer those are the convolutions. "Adapted" counts layers, default and
all-linear.
"""


def load(backend):
    path = RESULTS / f"{backend}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(backend, found):
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{backend}.json"
    path.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


def run(backend, parts, missing):
    """Checks the chosen classes on the backend that Keras runs on."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    warnings.simplefilter("ignore")
    import fast_compile  # noqa: F401
    import keras
    from hub_backbones import CASES, KNOWN, run_checks

    found = load(backend)
    names = [name for name in CASES if not parts or any(part in name for part in parts)]
    for name in names:
        if missing and name in found:
            continue
        known = KNOWN.get((name, backend), KNOWN.get((name, None), {}))
        if "all" in known:
            found[name] = {"not run": known["all"]}
        else:
            keras.utils.clear_session(free_memory=False)
            found[name] = {
                targets or DEFAULT: {
                    "failures": {
                        check: known.get(check, text) for check, text in result.failures.items()
                    },
                    "adapted": len(result.adapted),
                    "not adaptable": sorted({_kind(reason) for _, reason in result.skipped}),
                }
                for targets, result in run_checks(CASES[name]).items()
            }
        found = {**load(backend), name: found[name]}
        save(backend, found)
        print(name, "green" if is_green(found[name]) else found[name], flush=True)


def _kind(reason):
    """Shortens a reason of the report to what is the same for every layer of its kind."""
    return reason.split("; it holds its weights itself")[0].split(", so that")[0]


def is_green(entry):
    return "not run" not in entry and not any(part["failures"] for part in entry.values())


def table(found, checks):
    """Returns the page."""
    notes: list = []

    def note(text):
        if text not in notes:
            notes.append(text)
        return str(notes.index(text) + 1)

    def cell(name, check):
        marks = []
        for backend, letter in zip(BACKENDS, "JTP", strict=True):
            entry = found[backend].get(name)
            if entry is None:
                marks.append(".")
            elif "not run" in entry:
                marks.append(f"{letter}({note(entry['not run'])})")
            else:
                texts = [part["failures"].get(check) for part in entry.values()]
                wrong = [text for text in texts if text]
                marks.append(f"{letter}({note(wrong[0])})" if wrong else letter)
        return " ".join(marks)

    names = sorted({name for entries in found.values() for name in entries})
    rows = []
    for name in names:
        entries = [found[backend].get(name, {}) for backend in BACKENDS]
        ran = next((entry for entry in entries if DEFAULT in entry), None)
        adapted = f"{ran[DEFAULT]['adapted']}, {ran[ALL_LINEAR]['adapted']}" if ran else ""
        held = "; ".join(ran[ALL_LINEAR]["not adaptable"]) if ran else ""
        rows.append([f"`{name}`", adapted, *(cell(name, check) for check in checks), held])
    heads = ["class", "adapted", *checks, "reported as not adaptable"]
    lines = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
    counts = []
    for backend in BACKENDS:
        green = sum(is_green(entry) for entry in found[backend].values())
        counts.append(f"{backend}: {green} of {len(found[backend])} run")
    page = [
        INTRODUCTION.format(versions=versions()),
        f"Classes on which all checks pass: {'; '.join(counts)}.",
        "",
    ]
    page += lines
    page += ["", *(f"{number}. {text}" for number, text in enumerate(notes, 1))]
    return "\n".join(page).rstrip() + "\n"


def versions():
    import keras
    import keras_hub

    # Of the modules, since a nightly build is a package of another name.
    return f"keras {keras.__version__}, keras-hub {keras_hub.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="parts of class names; none for all classes")
    parser.add_argument("--missing", action="store_true", help="only classes without a result")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    arguments = parser.parse_args()
    if not arguments.table:
        backend = os.environ.get("KERAS_BACKEND")
        if backend not in BACKENDS:
            parser.error(f"set KERAS_BACKEND to one of {BACKENDS}, not {backend!r}")
        run(backend, arguments.parts, arguments.missing)
    checks = ("enables", "unchanged", "every path", "trains", "saves and loads", "merges")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table({backend: load(backend) for backend in BACKENDS}, checks))
    print(f"wrote {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
