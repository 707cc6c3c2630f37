"""Measures every arm in turn, A B C A B C ..., and writes ratios as JSON and Markdown.

    python -m benchmarks
    python -m benchmarks --cases optimizer_step --backends torch jax --blocks 15

Every backend has a process of its own; blocks of all arms of all backends alternate, so that a slow
moment of the machine falls on all of them. A ratio is the median over blocks of the ratio within
one round; the spread is its interquartile range over the median. Beside each ratio stands that of
the frozen model, which has no adapter and trains one small variable: the least that any adapter
could take.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

RESULTS = pathlib.Path(__file__).with_name("results")
README = pathlib.Path(__file__).parents[1] / "README.md"

# Figures of the design contract: (case, backend, arm, reference, reference backend) -> bound.
BOUNDS = [
    ("bert_wide", "jax", "ours", "native", "jax", 0.74 * 1.05),
    ("bert_wide", "torch", "ours", "native", "torch", 0.70 * 1.05),
    ("bert_wide", "tensorflow", "ours", "native", "tensorflow", 0.61 * 1.05),
    ("bert_wide", "torch", "ours", "peft", "torch", 1.0),
    ("bert_wide", "jax", "ours", "peft", "torch", 0.81 * 1.05),
    ("bert_wide", "tensorflow", "ours", "peft", "torch", 0.50 * 1.05),
    ("bert_wide", "jax", "ours", "limit", "jax", 1.2),
    ("bert_wide", "torch", "ours", "limit", "torch", 1.1),
    ("bert_wide", "tensorflow", "ours", "limit", "tensorflow", 1.1),
    ("dense_stack", "jax", "ours", "native", "jax", 0.29 * 1.05),
    ("dense_stack", "torch", "ours", "native", "torch", 0.34 * 1.05),
    ("dense_stack", "tensorflow", "ours", "native", "tensorflow", 0.44 * 1.05),
    ("optimizer_step", "torch", "ours", "torch_fused", "torch", 1.5),
    ("optimizer_step", "jax", "ours", "stock", "jax", 1.05),
    ("optimizer_step", "tensorflow", "ours", "stock", "tensorflow", 1.05),
]
STEPS = {"bert_wide": 3, "dense_stack": 9, "optimizer_step": 41}


class Worker:
    """One process with one backend and the arms of one case."""

    def __init__(self, case, backend):
        self.backend = backend
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", case],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.first_step = json.loads(self._answer())["first_step"]

    def block(self, arm, steps):
        self.process.stdin.write(f"{arm} {steps}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"The worker on {self.backend} ended with {self.process.wait()}.")
        return line

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(case, backends, blocks):
    """Returns {(backend, arm): [seconds of a step, one a round]} and the first steps."""
    workers = [Worker(case, backend) for backend in backends]
    arms = [(worker, arm) for worker in workers for arm in worker.first_step]
    seconds = {(worker.backend, arm): [] for worker, arm in arms}
    for round_number in range(blocks + 1):
        for worker, arm in arms:
            taken = worker.block(arm, STEPS[case])
            if round_number:  # the first round warms up
                seconds[worker.backend, arm].append(taken)
    first = {(w.backend, arm): value for w in workers for arm, value in w.first_step.items()}
    for worker in workers:
        worker.close()
    return seconds, first


def spread(values):
    """Interquartile range over the median."""
    quarters = statistics.quantiles(values, n=4)
    return (quarters[2] - quarters[0]) / statistics.median(values)


def ratios(case, seconds):
    """Returns a row for every figure of the contract that was measured."""
    rows = []
    for of_case, backend, arm, reference, reference_backend, bound in BOUNDS:
        ours, theirs = (backend, arm), (reference_backend, reference)
        if of_case != case or ours not in seconds or theirs not in seconds:
            continue
        values = _quotients(seconds, ours, theirs)
        frozen = (backend, "limit")
        floor = None
        if frozen in seconds and reference != "limit":
            floor = round(statistics.median(_quotients(seconds, frozen, theirs)), 3)
        rows.append(
            {
                "case": case,
                "backend": backend,
                "reference": f"{reference} ({reference_backend})",
                "ratio": round(statistics.median(values), 3),
                "spread": round(spread(values), 3),
                "frozen": floor,
                "bound": round(bound, 3),
            }
        )
    return rows


def _quotients(seconds, ours, theirs):
    return [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]


def as_markdown(result):
    """Returns the table of ratios."""
    lines = [
        "| case | backend | ours / | ratio | spread | frozen model / the same | must reach |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["ratios"]:
        met = "" if row["ratio"] <= row["bound"] else " (not met)"
        frozen = "" if row["frozen"] is None else f"{row['frozen']:.2f}"
        lines.append(
            f"| {row['case']} | {row['backend']} | {row['reference']} | {row['ratio']:.2f} | "
            f"{100 * row['spread']:.0f} % | {frozen} | {row['bound']:.2f}{met} |"
        )
    return "\n".join(lines) + "\n"


def into_readme(text, result):
    """Returns the README with the table of a result in its place."""
    begin, end = "<!-- bench: begin -->\n", "<!-- bench: end -->"
    head, _, rest = text.partition(begin)
    tail = rest.partition(end)[2]
    said = (
        f"Measured {result['date']} on {result['machine']}; medians of {result['blocks']} "
        "interleaved blocks (`make bench`).\n\n"
    )
    return head + begin + said + as_markdown(result) + end + tail


def versions():
    names = ("keras", "keras-hub", "tensorflow", "jax", "torch", "peft", "transformers", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--backends", nargs="+", default=["tensorflow", "jax", "torch"])
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used",
        "python": platform.python_version(),
        "versions": versions(),
        "blocks": options.blocks,
        "ratios": [],
        "arms": [],
    }
    for case in options.cases:
        seconds, first = measure(case, options.backends, options.blocks)
        result["ratios"] += ratios(case, seconds)
        result["arms"] += [
            {
                "case": case,
                "backend": backend,
                "arm": arm,
                "milliseconds": round(1000 * statistics.median(values), 3),
                "spread": round(spread(values), 3),
                "first_step_seconds": round(first[backend, arm], 2),
            }
            for (backend, arm), values in seconds.items()
        ]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "ratios.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.output / "ratios.md").write_text(as_markdown(result))
    if options.output == RESULTS and options.cases == list(STEPS):
        README.write_text(into_readme(README.read_text(), result))
    print(as_markdown(result))


if __name__ == "__main__":
    main()
