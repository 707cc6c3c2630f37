"""Measures this library against every peer in one process tree; writes JSON, Markdown, a picture.

    python -m benchmarks                                     all parts
    python -m benchmarks --suite quick                       little of each; commits nothing
    python -m benchmarks --suite gpu                         all parts in float32 and bfloat16
    python -m benchmarks --parts contract --blocks 15
    python -m benchmarks --parts memory --cases bert_wide --backends torch jax

Every backend has a process of its own, in which the arms take turns step by step; the backends take
turns block by block, so that a slow moment of the machine falls on all of them. A ratio is the
median over rounds of the ratio within one round; the spread is its interquartile range over the
median. A training step is one that `fit` runs. Memory and first steps are measured in a fresh
process for each arm. Each part writes results/PART.json and PART.md, with the seconds that it took,
and then the README's part on measurements anew.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import subprocess
import tempfile
import time

from benchmarks import contract, readme, report
from benchmarks.names import BACKENDS
from benchmarks.parts import PARTS

# Rounds of a part. The contract's ratios are the ones with a bound; the other parts have many more
# arms.
BLOCKS = {
    "contract": 7,
    "models": 3,
    "optimizer": 3,
    "growth": 3,
    "checkpointing": 3,
    "monitor": 5,
    "huge_pages": 5,
}
QUICK = {
    "contract": {"cases": ["dense_stack", "optimizer_step"], "blocks": 2},
    "models": {"cases": ["minilm_qv"], "blocks": 2, "arms": ("native", "ours", "limit")},
    "memory": {"cases": ["minilm_qv"], "arms": ("native", "ours")},
}
GPU_DTYPES = ("float32", "bfloat16")


def versions():
    """Returns the versions of what is measured, as far as it is installed."""
    names = ("keras", "keras-hub", "tensorflow", "jax", "torch", "peft", "transformers", "numpy")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


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
    """Writes one part's JSON and Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    name = (readme.CONTRACT if part == "contract" else part) + suffix
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    if part != "contract":
        page = report.as_markdown(part, result)
    else:
        page = contract.as_markdown(result)
        report.plot(result, folder / f"{name}.png")
    (folder / f"{name}.md").write_text(page)
    print(page, flush=True)


def timed(function, *arguments):
    """Returns what a part took, in seconds, and what it returned."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    found = function(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "elapsed_seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(worked, 1),
    }, found


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=["quick", "full", "gpu"], default="full")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="default: the suite's")
    parser.add_argument("--cases", nargs="+", help="cases of the part (one part only)")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--blocks", type=int, help=f"rounds; default: {BLOCKS}")
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
        output = readme.RESULTS
        if options.suite == "quick" or options.cases or set(options.backends) != set(BACKENDS):
            # A part of the measurements must not take the place of the committed ones.
            output = pathlib.Path(tempfile.mkdtemp(prefix="benchmarks-"))
    for dtype in dtypes:
        for part, settings in parts.items():
            chosen = {**settings, **{name: value for name, value in given.items() if value}}
            options.cases, options.dtype = chosen.get("cases"), dtype
            options.blocks = chosen.get("blocks", BLOCKS.get(part))
            options.arms = chosen.get("arms", ())
            spent, found = timed(PARTS[part], options)
            result = {**header(options, machine), **spent, **found}
            write(part, result, output, f"_gpu_{dtype}" if dtype else "")
            print(f"{part} took {spent['elapsed_seconds']:.0f} seconds\n", flush=True)
            if output == readme.RESULTS:
                readme.update()
    print(f"Written: {output}")


if __name__ == "__main__":
    main()
