"""The parts of a suite: each measures something and returns rows, plain data for JSON."""

import concurrent.futures
import json
import math
import os
import statistics
import subprocess
import sys

from benchmarks import contract, monitoring
from benchmarks.names import (
    CONTRACT_CASES,
    EINSUM_CASES,
    GROWTH,
    HUGE_PAGES,
    HUGE_PAGES_CASES,
    MEMORY_CASES,
    MODEL_CASES,
    TENSORS,
)
from benchmarks.rounds import LONG_BLOCK_SECONDS, SHORT_BLOCK_SECONDS, environment, measure

# Bars of the benchmark suite beside those of the contract.
ENABLE_SECONDS, MANY_MULTIPLIERS = 2.0, 2.0
# Sets of processes that a ratio of the contract is measured in, where there are as many rounds.
SETS = 3
# Exponents of tokens * r * (n + m) in each size.
EXPECTED_GROWTH = {"width": 1.0, "tokens": 1.0, "rank": 1.0, "layers": 1.0}


def run_contract(options):
    """Returns {"ratios": rows, "arms": rows} for the cases of the design contract."""
    found = {"ratios": [], "arms": []}
    few = options.blocks < SETS
    for case in options.cases or CONTRACT_CASES:
        times = measure(
            case,
            options.backends,
            options.blocks,
            dtype=options.dtype,
            block_seconds=SHORT_BLOCK_SECONDS if few else LONG_BLOCK_SECONDS,
            sets=1 if few else SETS,
        )
        found["ratios"] += contract.ratios(case, times.seconds)
        found["arms"] += times.arms(case)
    return found


def run_models(options):
    """Returns {"arms": rows}: a step of every arm of every model, and over the frozen model."""
    rows = []
    for case in options.cases or (*MODEL_CASES, *EINSUM_CASES):
        times = measure(
            case, options.backends, options.blocks, arms=options.arms, dtype=options.dtype
        )
        for row in times.arms(case):
            frozen = times.ratio((row["backend"], row["arm"]), (row["backend"], "limit"))
            rows.append({**row, "over_limit": frozen})
    return {"arms": rows}


def run_memory(options):
    """Returns {"memory": rows}: what a step of each arm needs, each in a fresh process."""
    wanted = [
        (case, backend, arm)
        for case in options.cases or MEMORY_CASES
        for backend in options.backends
        for arm in _arms(backend)
        if not options.arms or arm in options.arms
    ]

    def measured(one):
        case, backend, arm = one
        found = child(backend, options.dtype, "memory", case, arm)
        print(f"memory {case} {backend} {arm}: {found}", file=sys.stderr, flush=True)
        return {"case": case, "backend": backend, "arm": arm, **found}

    # Memory, unlike time, is that of a process alone. On a GPU its processes share what is there.
    at_once = 1 if options.dtype else os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        return {"memory": list(pool.map(measured, wanted))}


def run_first_step(options):
    """Returns {"first_step": rows}: seconds with tracing and compilation, fresh processes in turn.

    On torch nothing is compiled, so it is left out.
    """
    rows = []
    for case in options.cases or ("bert_wide",):
        for backend in (name for name in options.backends if name != "torch"):
            seconds = {arm: [] for arm in ("native", "ours")}
            for _ in range(3):
                for arm, values in seconds.items():
                    values.append(child(backend, options.dtype, "first_step", case, arm)["first"])
            medians = {arm: statistics.median(values) for arm, values in seconds.items()}
            rows.append(
                {
                    "case": case,
                    "backend": backend,
                    **{arm: round(value, 3) for arm, value in medians.items()},
                    "ratio": round(medians["ours"] / medians["native"], 3),
                }
            )
    return {"first_step": rows}


def run_large(options):
    """Returns {"large": rows}: enabling and merging at a billion parameters, a row a backend.

    Seconds and bytes are those of two processes: malloc is slower where the resident set follows
    what lives.
    """
    rows = []
    for backend in options.backends:
        found, resident = (child(backend, None, kind) for kind in ("large", "large_resident"))
        for what in ("enable", "merge"):
            found[what]["extra_bytes"] = resident[what]["extra_bytes"]
        within = found["enable"]["seconds"] <= ENABLE_SECONDS
        rows.append({"backend": backend, **found, "bound": ENABLE_SECONDS, "met": within})
    return {"large": rows}


def run_optimizer(options):
    """Returns {"optimizer": rows, "many": rows}; the second is 48 multipliers over 2, ours."""
    rows, many = [], []
    for count in TENSORS:
        case = f"optimizer_{count}"
        times = measure(case, options.backends, options.blocks, block_seconds=SHORT_BLOCK_SECONDS)
        for row in times.arms(case):
            optimizer, _, multipliers = row.pop("arm").rpartition("/")
            rows.append({**row, "optimizer": optimizer, "multipliers": int(multipliers)})
        for backend in options.backends:
            found = times.ratio((backend, "ours/48"), (backend, "ours/2"))
            if found is not None:
                bound = {"bound": MANY_MULTIPLIERS, "met": found["ratio"] <= MANY_MULTIPLIERS}
                many.append({"tensors": count, "backend": backend, **found, **bound})
    return {"optimizer": rows, "many": many}


def run_growth(options):
    """Returns {"growth": rows}: what the adapter adds to a step, and how that grows."""
    rows = []
    for what in options.cases or GROWTH:
        times = measure(
            f"growth_{what}",
            options.backends,
            options.blocks,
            block_seconds=SHORT_BLOCK_SECONDS,
        )
        for backend in options.backends:
            added = {}
            for (of, arm), values in times.seconds.items():
                kind, _, size = arm.partition("/")
                if of == backend and kind == "ours":
                    frozen = times.seconds[backend, f"limit/{size}"]
                    pairs = zip(values, frozen, strict=True)
                    added[int(size)] = statistics.median(a - b for a, b in pairs)
            rows.append(
                {
                    "size": what,
                    "backend": backend,
                    "added_milliseconds": {n: round(1000 * s, 4) for n, s in added.items()},
                    "exponent": fitted_exponent(added),
                    "expected": EXPECTED_GROWTH[what],
                }
            )
    return {"growth": rows}


def fitted_exponent(added):
    """Returns the slope of log seconds over log size in the upper half of the sizes, or None.

    At the small ones a step's fixed cost hides the adapter's; what is not positive is noise.
    """
    points = [(math.log(n), math.log(s)) for n, s in sorted(added.items()) if s > 0]
    points = points[len(points) // 2 - 1 :] if len(points) > 2 else points
    if len(points) < 2:
        return None
    slope, _ = statistics.linear_regression(*zip(*points, strict=True))
    return round(slope, 2)


def run_checkpointing(options):
    """Returns {"checkpointing": rows}: memory and time of each mode of `keras.RematScope`."""
    times = measure("checkpointing", options.backends, options.blocks, dtype=options.dtype)
    rows = []
    for row in times.arms("checkpointing"):
        memory = child(row["backend"], options.dtype, "memory", "checkpointing", row["arm"])
        rows.append({**row, **memory})
    return {"checkpointing": rows}


def run_huge_pages(options):
    """Returns {"huge_pages": rows}: our step with huge pages over that without."""
    rows = []
    for case in options.cases or HUGE_PAGES_CASES:
        for backend in options.backends:
            names = [backend, backend + HUGE_PAGES]
            times = measure(
                case, names, options.blocks, arms=("ours",), dtype=options.dtype, sets=SETS
            )
            plain, huge = ((name, "ours") for name in names)
            milliseconds = {
                key: round(1000 * statistics.median(times.seconds[of]), 3)
                for key, of in (("plain", plain), ("huge", huge))
            }
            ratio = times.ratio(huge, plain)
            rows.append({"case": case, "backend": backend, "milliseconds": milliseconds, **ratio})
    return {"huge_pages": rows}


def run_profile(options):
    """Returns {"profile": rows, "floors": rows}: the contract's transformer step on torch."""
    rows, floors = [], []
    if "torch" in options.backends:
        for case in options.cases or ("bert_wide",):
            found = child("torch", options.dtype, "profile", case)
            rows += [{"case": case, **row} for row in found["rows"]]
            floors.append({"case": case, **found["floor"]})
    return {"profile": rows, "floors": floors}


def child(backend, dtype, *arguments):
    """Returns what `benchmarks.child` measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.child", *arguments],
        env=environment(backend, dtype),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} on {backend} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def _arms(backend):
    arms = ("full", "native", "native_same", "ours", "limit")
    # PEFT's step runs in torch itself, whatever Keras would run on.
    return (*arms, "peft") if backend == "torch" else arms


# Each is written as it ends: what is held to a bound, or shown in the README, comes first.
PARTS = {
    "contract": run_contract,
    "memory": run_memory,
    "large": run_large,
    "monitor": monitoring.run,
    "models": run_models,
    "optimizer": run_optimizer,
    "checkpointing": run_checkpointing,
    "first_step": run_first_step,
    "growth": run_growth,
    "profile": run_profile,
    "huge_pages": run_huge_pages,
}
