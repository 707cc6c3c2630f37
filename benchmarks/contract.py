"""The figures of the design contract: which ratios are formed, and the bound of each."""

import statistics

from benchmarks.rounds import spread

# (case, backend, arm, reference, reference backend) -> bound.
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


def ratios(case, seconds):
    """Returns a row for every figure of the contract that was measured.

    Args:
        case: Name of the case.
        seconds: Dict from (backend, arm) to seconds of a step, one a round.
    """
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
