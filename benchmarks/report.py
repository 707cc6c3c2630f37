"""Markdown tables and the picture of what a suite measured."""

MEGABYTE = 1e6
# Of a step; an operation that takes less in every arm is in the JSON only.
SHOWN_SHARE = 0.004


def as_markdown(part, result):
    """Returns a page for one part's result."""
    head = f"# {TITLES[part]}\n\n{measured(result)}\n\n"
    return head + "\n".join(TABLES[part](result)) + "\n"


def measured(result):
    """Returns when, where and with what it was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    dtype = f"; dtype policy {result['dtype']}" if result.get("dtype") else ""
    blocks = f"; {result['blocks']} interleaved blocks" if result.get("blocks") else ""
    took = f"; it took {result['elapsed_seconds']:.0f} s" if "elapsed_seconds" in result else ""
    return f"Measured {result['date']} on {result['machine']}{blocks}{dtype}{took}; {versions}."


def table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]


def _models(result):
    heads = ["case", "backend", "arm", "ms a step", "spread", "over the frozen model"]
    return table(
        heads,
        [
            [
                row["case"],
                row["backend"],
                row["arm"],
                f"{row['milliseconds']:.1f}",
                f"{100 * row['spread']:.0f} %",
                f"{row['over_limit']['ratio']:.2f}",
            ]
            for row in result["arms"]
        ],
    )


def _memory(result):
    """Extra bytes, and those over the frozen model's."""
    frozen = {
        (row["case"], row["backend"]): row["extra"]
        for row in result["memory"]
        if row["arm"] == "limit"
    }
    heads = ["case", "backend", "arm", "beyond the model, MB", "over the frozen model", "method"]
    rows = []
    for row in result["memory"]:
        limit = frozen.get((row["case"], row["backend"]))
        quotient = f"{row['extra'] / limit:.2f}" if limit and limit > 0 else ""
        extra = f"{row['extra'] / MEGABYTE:.0f}"
        rows.append([row["case"], row["backend"], row["arm"], extra, quotient, row["method"]])
    return table(heads, rows)


def _optimizer(result):
    heads = ["tensors", "backend", "optimizer", "multipliers", "ms a step", "spread"]
    rows = [
        [
            row["case"].removeprefix("optimizer_"),
            row["backend"],
            row["optimizer"],
            row["multipliers"],
            f"{row['milliseconds']:.3f}",
            f"{100 * row['spread']:.0f} %",
        ]
        for row in result["optimizer"]
    ]
    many = [
        [row["tensors"], row["backend"], f"{row['ratio']:.2f}", f"{row['bound']}{_met(row)}"]
        for row in result["many"]
    ]
    heads_many = ["tensors", "backend", "48 multipliers over 2", "must reach"]
    return [*table(heads, rows), "", *table(heads_many, many)]


def _growth(result):
    heads = ["size", "backend", "ms that the adapter adds", "fitted exponent", "expected"]
    rows = []
    for row in result["growth"]:
        added = ", ".join(f"{n}: {ms:.2f}" for n, ms in row["added_milliseconds"].items())
        fitted = "none" if row["exponent"] is None else row["exponent"]
        rows.append([row["size"], row["backend"], added, fitted, row["expected"]])
    return table(heads, rows)


def _large(result):
    heads = [
        "backend",
        "parameters",
        "enabling, s",
        "its extra MB (A and B)",
        "merging, s",
        "its extra MB (largest weight in float32)",
        "enabling must reach",
    ]
    rows = [
        [
            row["backend"],
            f"{row['parameters']:,}",
            f"{row['enable']['seconds']:.2f}",
            f"{row['enable']['extra_bytes'] / MEGABYTE:.0f} "
            f"({row['adapter_bytes'] / MEGABYTE:.0f})",
            f"{row['merge']['seconds']:.2f}",
            f"{row['merge']['extra_bytes'] / MEGABYTE:.0f} "
            f"({row['largest_weight_as_float32_bytes'] / MEGABYTE:.0f})",
            f"{row['bound']:.0f} s{_met(row)}",
        ]
        for row in result["large"]
    ]
    return table(heads, rows)


def _first_step(result):
    heads = ["case", "backend", "native, s", "ours, s", "ours / native"]
    keys = ("case", "backend", "native", "ours", "ratio")
    return table(heads, [[row[key] for key in keys] for row in result["first_step"]])


def _checkpointing(result):
    heads = ["backend", "recomputed", "ms a step", "spread", "beyond the model, MB", "method"]
    rows = [
        [
            row["backend"],
            row["arm"],
            f"{row['milliseconds']:.1f}",
            f"{100 * row['spread']:.0f} %",
            f"{row['extra'] / MEGABYTE:.0f}",
            row["method"],
        ]
        for row in result["checkpointing"]
    ]
    return table(heads, rows)


def _monitor(result):
    heads = ["backend", "ms a step", "ms a measured step", "share of training", "must stay under"]
    rows = [
        [
            row["backend"],
            f"{row['step_ms']:.1f}",
            f"{row['measured_ms']:.1f}",
            f"{100 * row['share']:.1f} %",
            f"{100 * row['bound']:.0f} %{_met(row)}",
        ]
        for row in result["monitor"]
    ]
    return table(heads, rows)


def _huge_pages(result):
    heads = ["case", "backend", "ms a step", "with huge pages", "ratio", "spread"]
    rows = [
        [
            row["case"],
            row["backend"],
            *(f"{row['milliseconds'][pages]:.1f}" for pages in ("plain", "huge")),
            f"{row['ratio']:.2f}",
            f"{100 * row['spread']:.0f} %",
        ]
        for row in result["huge_pages"]
    ]
    return table(heads, rows)


def operation_sums(result):
    """Returns {case: {arm: milliseconds that all operations of a step take}}."""
    sums = {}
    for row in result["profile"]:
        of_case = sums.setdefault(row["case"], dict.fromkeys(row["milliseconds"], 0.0))
        for arm, milliseconds in row["milliseconds"].items():
            of_case[arm] += milliseconds
    return sums


def _profile(result):
    """The operations that take most in any arm, and what all of them take."""
    lines = []
    for case, sums in operation_sums(result).items():
        arms = list(sums)
        shown = [
            row
            for row in result["profile"]
            if row["case"] == case
            and max(row["milliseconds"].values()) >= SHOWN_SHARE * sums["ours"]
        ]
        heads = ["case", "operation", *(f"{arm}, ms (calls)" for arm in arms), "ours - limit, ms"]
        cells = [
            [
                case,
                f"`{row['operation']}`",
                *(f"{row['milliseconds'][arm]:.1f} ({row['calls'][arm]})" for arm in arms),
                f"{row['milliseconds']['ours'] - row['milliseconds']['limit']:+.1f}",
            ]
            for row in shown
        ]
        total = [case, "all", *(f"{sums[arm]:.1f}" for arm in arms)]
        cells.append([*total, f"{sums['ours'] - sums['limit']:+.1f}"])
        lines += [*table(heads, cells), "", floor(result, case), ""]
    return lines[:-1]


def floor(result, case):
    """Returns a sentence on how much of PEFT's step its products take at the least."""
    (row,) = (row for row in result["floors"] if row["case"] == case)
    milliseconds = 1000 * row["flops"] / row["flops_per_second"]
    share = milliseconds / operation_sums(result)[case]["peft"]
    return (
        f"{case}: at {row['flops_per_second'] / 1e9:.0f} GFLOP/s, which the fastest product of "
        f"large matrices reaches here, the {row['flops'] / 1e9:.1f} GFLOP of PEFT's products take "
        f"{milliseconds:.0f} ms, {share:.2f} of its operations' time."
    )


def _met(row):
    return "" if row["met"] else " (not met)"


TITLES = {
    "monitor": "What LoRAPlusMonitor adds to training at its default",
    "models": "A training step of every arm",
    "memory": "What a training step needs beyond the built model",
    "optimizer": "The optimizer's step alone",
    "growth": "What an adapter adds to a step, and how it grows",
    "large": "Enabling and merging at a billion parameters in bfloat16",
    "first_step": "The first step, tracing and compilation included",
    "checkpointing": "Gradient checkpointing of an adapted transformer",
    "profile": "The operations of a step on torch",
    "huge_pages": "Our step where Linux's allocator asks for huge pages",
}
TABLES = {
    "monitor": _monitor,
    "models": _models,
    "memory": _memory,
    "optimizer": _optimizer,
    "growth": _growth,
    "large": _large,
    "first_step": _first_step,
    "checkpointing": _checkpointing,
    "profile": _profile,
    "huge_pages": _huge_pages,
}


def plot(result, path):
    """Draws the contract's ratios, one bar a figure, its bound as a mark; readable in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["ratios"]
    figure, axis = pyplot.subplots(figsize=(8, 0.4 * len(rows) + 1.6), layout="constrained")
    at = range(len(rows))
    hatches = {"jax": "///", "torch": "...", "tensorflow": ""}
    for position, row in zip(at, rows, strict=True):
        axis.barh(
            position,
            row["ratio"],
            color="0.75",
            edgecolor="0.2",
            hatch=hatches[row["backend"]],
            height=0.6,
        )
        half = row["ratio"] * row["spread"] / 2
        axis.errorbar(row["ratio"], position, xerr=half, color="0.2", capsize=3)
        axis.plot([row["bound"]] * 2, [position - 0.42, position + 0.42], color="black", lw=2.5)
    names = [f"{row['case']}, {row['backend']} / {row['reference']}" for row in rows]
    axis.set_yticks(list(at), names)
    axis.invert_yaxis()
    axis.set_xlabel("time of ours over the other's (median; whisker: interquartile range)")
    axis.set_title("Ratios of one run; the thick mark is what must be reached")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
