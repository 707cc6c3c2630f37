"""Measures this library against every peer in one process tree; writes JSON, Markdown, a picture.

    python -m benchmarks                                     all parts
    python -m benchmarks --suite quick                       little of each; commits nothing
    python -m benchmarks --suite gpu                         all parts in float32 and bfloat16
    python -m benchmarks --parts contract --blocks 15
    python -m benchmarks --parts memory --cases bert_wide --backends torch jax

Every backend has a process of its own; blocks of all arms of all backends alternate, so that a slow
moment of the machine falls on all of them. A ratio is the median over rounds of the ratio within
one round; the spread is its interquartile range over the median. Memory and first steps are
measured in a fresh process for each arm. Each part writes results/PART.json and PART.md.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import tempfile

from benchmarks import contract, report
from benchmarks.names import BACKENDS
from benchmarks.parts import PARTS

RESULTS = pathlib.Path(__file__).with_name("results")
README = pathlib.Path(__file__).parents[1] / "README.md"
QUICK = {
    "contract": {"cases": ["dense_stack", "optimizer_step"], "blocks": 5},
    "models": {"cases": ["minilm_qv"], "blocks": 3},
    "memory": {"cases": ["minilm_qv"]},
}
GPU_DTYPES = ("float32", "bfloat16")


def versions():
    names = ("keras", "keras-hub", "tensorflow", "jax", "torch", "peft", "transformers", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def gpu():
    """Returns the name and driver of the GPU.

    Raises:
        SystemExit: Without one.
    """
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        found = ""
    if not found:
        raise SystemExit(
            "--suite gpu needs a GPU: `nvidia-smi` names none on this machine. Take --suite full."
        )
    return found.splitlines()[0]


def header(options, machine):
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "python": platform.python_version(),
        "versions": versions(),
        "blocks": options.blocks,
        "dtype": options.dtype,
    }


def write(part, result, folder, suffix=""):
    """Writes one part's JSON and Markdown; the contract's go into the README too."""
    folder.mkdir(parents=True, exist_ok=True)
    name = ("ratios" if part == "contract" else part) + suffix
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    if part != "contract":
        page = report.as_markdown(part, result)
    else:
        page = contract.as_markdown(result)
        report.plot(result, folder / f"{name}.png")
    (folder / f"{name}.md").write_text(page)
    print(page, flush=True)


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=["quick", "full", "gpu"], default="full")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="default: the suite's")
    parser.add_argument("--cases", nargs="+", help="cases of the part (one part only)")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--blocks", type=int, help="rounds; default: 9")
    parser.add_argument("--output", type=pathlib.Path, help="folder; default: results/")
    options = parser.parse_args(arguments)
    if options.cases and len(options.parts or ()) != 1:
        parser.error("--cases goes with one part: --parts PART")
    if options.blocks is not None and options.blocks < 2:
        parser.error("--blocks must be at least 2, for a spread")
    return options


def main(arguments=None):
    options = parse(arguments)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, no GPU used"
    dtypes = (None,)
    if options.suite == "gpu":
        machine, dtypes = gpu(), GPU_DTYPES
    given = {"cases": options.cases, "blocks": options.blocks}
    parts = {part: {} for part in options.parts or PARTS}
    if options.suite == "quick":
        parts = {part: QUICK.get(part, {}) for part in options.parts or QUICK}
    output = options.output
    if output is None:
        output = RESULTS
        if options.suite == "quick" or options.cases or set(options.backends) != set(BACKENDS):
            # A part of the measurements must not take the place of the committed ones.
            output = pathlib.Path(tempfile.mkdtemp(prefix="benchmarks-"))
    for dtype in dtypes:
        for part, settings in parts.items():
            chosen = {**settings, **{name: value for name, value in given.items() if value}}
            options.cases, options.blocks = chosen.get("cases"), chosen.get("blocks", 9)
            options.dtype = dtype
            result = {**header(options, machine), **PARTS[part](options)}
            write(part, result, output, f"_gpu_{dtype}" if dtype else "")
            if part == "contract" and output == RESULTS and dtype is None:
                README.write_text(contract.into_readme(README.read_text(), result))
    print(f"Written: {output}")


if __name__ == "__main__":
    main()
