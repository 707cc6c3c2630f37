"""Where a step on torch spends its time, operation by operation: ours, the frozen model and PEFT.

TensorFlow and JAX run a step as one compiled program; torch runs operations that can be told apart.
"""

import statistics

ARMS = ("ours", "limit", "peft")
STEPS, WARM_UP = 12, 2


def operations(case):
    """Returns {"rows": rows}: milliseconds and calls in a step of each arm, a row an operation.

    The arms' steps alternate. The milliseconds are medians over the steps of what torch's profiler
    counts as an operation's own time.

    Args:
        case: A case of `benchmarks.cases`.
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
    return {"rows": rows(times, calls)}


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
