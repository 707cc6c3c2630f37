"""Where a step on torch spends its time, operation by operation: ours, the frozen model and PEFT.

TensorFlow and JAX run a step as one compiled program; torch runs operations that can be told apart.
"""

import statistics
import time

import numpy as np

ARMS = ("ours", "limit", "peft")
STEPS, WARM_UP = 12, 2
# The width of the square matrices by whose product the machine's rate is measured, and how often.
WIDTH, PRODUCTS = 2048, 15


def operations(case):
    """Returns milliseconds and calls in a step of each arm, a row an operation, and a floor.

    The arms' steps alternate. The milliseconds are medians over the steps of what torch's profiler
    counts as an operation's own time. The floor of a step is PEFT's multiplications and additions,
    as torch counts them, at the fastest rate that a product of large matrices reaches here.

    Args:
        case: A case of `benchmarks.cases`.

    Returns:
        {"rows": rows, "floor": {"flops": in a step, "flops_per_second": the machine's}}.
    """
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.cases import CASES

    steps = {arm: make() for arm, make in CASES[case]().items() if arm in ARMS}
    times, calls = {arm: [] for arm in steps}, {}
    for number in range(WARM_UP + STEPS):
        for arm, step in steps.items():
            with profile(activities=[ProfilerActivity.CPU]) as found:
                step()
            events = found.key_averages()
            calls[arm] = {event.key: event.count for event in events}
            if number >= WARM_UP:
                times[arm].append({e.key: e.self_cpu_time_total / 1000 for e in events})
    floor = {"flops": counted(steps["peft"]), "flops_per_second": fastest_rate(WIDTH)}
    return {"rows": rows(times, calls), "floor": floor}


def counted(step):
    """Returns the multiplications and additions of a step's products."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def fastest_rate(width):
    """Returns the multiplications and additions in a second of the fastest product found.

    Those of torch (MKL), of oneDNN, of numpy (OpenBLAS), float32, every call by itself.
    """
    import torch

    a, b = (np.random.default_rng(seed).random((width, width), "float32") for seed in (0, 1))
    c, d = torch.from_numpy(a), torch.from_numpy(b)
    products = [lambda: a @ b, lambda: c @ d]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # private: checked on torch 2.13.0
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(c, d, None, "none", [], ""))
    shortest = float("inf")
    for _ in range(PRODUCTS):
        for product in products:
            start = time.perf_counter()
            product()
            shortest = min(shortest, time.perf_counter() - start)
    return 2 * width**3 / shortest


def rows(times, calls):
    """Returns the rows, those first in which ours takes most over the frozen model.

    Args:
        times: Dict from arm to one dict a step, from operation to milliseconds.
        calls: Dict from arm to the calls of each operation in a step.
    """
    names = {name for found in times.values() for step in found for name in step}
    made = [
        {
            "operation": name,
            "milliseconds": {
                arm: round(statistics.median(step.get(name, 0.0) for step in found), 3)
                for arm, found in times.items()
            },
            "calls": {arm: calls[arm].get(name, 0) for arm in times},
        }
        for name in names
    ]

    def order(row):
        return row["milliseconds"]["limit"] - row["milliseconds"]["ours"], row["operation"]

    return sorted(made, key=order)
