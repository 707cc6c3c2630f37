"""Pictures of sweeps, readable in grey."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from keras_loraplus.tuning.result import NAMES, SweepResult

_LINES = ((1, "-"), (8, "--"), (16, "-."), (32, ":"))
# Arms by line style, marker and shade, so that they differ in grey.
_STYLES = {
    "loraplus": {"ls": "-", "marker": "o", "c": "black"},
    "lora": {"ls": "--", "marker": "s", "c": "0.35"},
    "full": {"ls": ":", "marker": "^", "c": "0.55"},
}


def plot_heatmap(
    result: SweepResult,
    *,
    arm: str = "loraplus",
    within: float = 0.01,
    ax: Any = None,
    path: Any = None,
) -> Any:
    """Draws the mean of the monitored metric over (eta_A, eta_B), both on logarithmic axes.

    A star marks the best cell, circles those within `within` of it (relative to its value), and
    crosses cells without a finished run of every seed. If the head's rate is an axis too, the best
    of its values is shown. Lines are those of equal `eta_B / eta_A`: 1, 8, 16 and 32.

    Args:
        result: What `sweep` returned.
        arm: `"loraplus"` or `"lora"`.
        within: Largest relative distance from the best cell that is marked.
        ax: Matplotlib axes to draw on; None makes a figure.
        path: Where to save the figure, if anywhere.

    Returns:
        The Matplotlib axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If no cell of the arm was finished with every seed, or the arm is `"full"`.

    Example:
        >>> rates = {"eta_a": 1e-4, "eta_b": 1.6e-3, "lr_ratio": 16.0, "head_rate": None}
        >>> record = {"arm": "loraplus", **rates, "seed": 0, "status": "complete", "value": 0.9,
        ...           "metrics": {}}
        >>> result = klp.tuning.SweepResult("accuracy", "max", [0], {}, {"loraplus": 1}, [record])
        >>> axes = klp.tuning.plot_heatmap(result, path="heatmap.png")
        >>> axes.get_title()
        'accuracy (validation), loraplus, mean of 1 seed, 1 cells'

    Source: figures 2 to 4 of [LoRA+](https://arxiv.org/abs/2402.12354).
    """
    if arm not in ("loraplus", "lora"):
        raise ValueError(f"`arm` must be 'loraplus' or 'lora', which have two rates. Got: {arm!r}")
    best_of: dict[tuple[float, float], float] = {}
    for cell in result.cells(arm):  # Best first.
        best_of.setdefault((cell["eta_a"], cell["eta_b"]), cell["mean"])
    if not best_of:
        raise ValueError(
            f"There is no cell of {arm!r} that was finished with all {len(result.seeds)} seeds; "
            f"arms with records: {result.arms}. `result.records` holds the errors."
        )
    axes = _axes(ax)
    best, top = next(iter(best_of.items()))
    close = [p for p, v in list(best_of.items())[1:] if abs(v - top) <= within * abs(top)]
    tried = {(r["eta_a"], r["eta_b"]) for r in result.records if r["arm"] == arm}
    lost = sorted(tried - set(best_of))
    shade = axes.scatter(
        *zip(*best_of, strict=True),
        c=list(best_of.values()),
        s=600,
        marker="s",
        edgecolors="0.4",
        cmap="Greys" if result.mode == "max" else "Greys_r",
    )
    marks = (
        ([best], "*", 170, "best cell"),
        (close, "o", 45, f"within {100 * within:g} % of it"),
    )
    for points, marker, size, label in marks:
        if points:
            axes.scatter(
                *zip(*points, strict=True),
                marker=marker,
                s=size,
                c="white",
                edgecolors="black",
                label=label,
                zorder=4,
            )
    if lost:
        axes.scatter(*zip(*lost, strict=True), marker="x", c="black", label="not finished")
    axes.set(xscale="log", yscale="log")
    a, b = ([point[side] for point in tried] for side in (0, 1))
    low, high = min(a) / 2, max(a) * 2
    for ratio, style in _LINES:
        label = rf"$\eta_B/\eta_A$ = {ratio}"
        (line,) = axes.plot([low, high], [low * ratio, high * ratio], style, c="0.1", lw=1.3)
        line.set(label=label, path_effects=_outlined())
    axes.set(xlim=(low, high), ylim=(min(b) / 2, max(b) * 2))
    axes.set(xlabel=r"$\eta_A$", ylabel=r"$\eta_B$")
    seeds = len(result.seeds)
    axes.set_title(
        f"{result.monitor} (validation), {arm}, mean of {seeds} seed{'s' * (seeds > 1)}, "
        f"{len(tried)} cells",
        fontsize="medium",
    )
    axes.figure.colorbar(shade, ax=axes, label=result.monitor)
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(0, -0.14), ncols=4)
    return _saved(axes, path)


def plot_ratio_distribution(
    results: Mapping[str, SweepResult], *, best: int = 4, ax: Any = None, path: Any = None
) -> Any:
    """Draws how often each ratio eta_B/eta_A is among the best cells, over tasks and seeds.

    Each seed of each result has a ranking of its own by the monitored metric; its `best` first
    LoRA+ cells count. Bars are stacked by task, with a hatch each.

    Args:
        results: Dict from the name of a task to what `sweep` returned for it.
        best: How many cells of each task and seed count. Defaults to 4, as in the article.
        ax: Matplotlib axes to draw on; None makes a figure.
        path: Where to save the figure, if anywhere.

    Returns:
        The Matplotlib axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If there is no result, or one has no finished LoRA+ cell.

    Example:
        >>> rates = {"eta_a": 1e-4, "eta_b": 1.6e-3, "lr_ratio": 16.0, "head_rate": None}
        >>> record = {"arm": "loraplus", **rates, "seed": 0, "status": "complete", "value": 0.9,
        ...           "metrics": {}}
        >>> result = klp.tuning.SweepResult("accuracy", "max", [0], {}, {"loraplus": 1}, [record])
        >>> axes = klp.tuning.plot_ratio_distribution({"R8": result}, path="ratios.png")
        >>> axes.get_title()
        'Best 4 LoRA+ cells by validation accuracy: 1 task, 1 ranking (task and seed)'

    Source: the last figure of [LoRA+](https://arxiv.org/abs/2402.12354).
    """
    counts: dict[str, dict[int, int]] = {}
    rankings = 0
    for task, result in results.items():
        exponents: dict[int, int] = {}
        for seed in result.seeds:
            done = [
                r
                for r in result.records
                if r["arm"] == "loraplus" and r["seed"] == seed and r["status"] == "complete"
            ]
            sign = -1 if result.mode == "max" else 1
            done.sort(key=lambda record: sign * record["value"])
            rankings += bool(done)
            for record in done[:best]:
                exponent = round(math.log2(record["lr_ratio"]))
                exponents[exponent] = exponents.get(exponent, 0) + 1
        if not exponents:
            raise ValueError(f"The result of {task!r} has no finished LoRA+ cell to count.")
        counts[task] = exponents
    if not counts:
        raise ValueError("Expected a dictionary from task to sweep result. Received none.")
    axes = _axes(ax)
    places = sorted({exponent for exponents in counts.values() for exponent in exponents})
    places = list(range(places[0], places[-1] + 1))
    floor = [0] * len(places)
    hatches = ("", "///", "...", "xxx", "---", "ooo")
    for number, (task, exponents) in enumerate(counts.items()):
        heights = [exponents.get(place, 0) for place in places]
        shade = str(0.95 - 0.55 * number / max(1, len(counts) - 1))
        look = {"color": shade, "edgecolor": "black", "hatch": hatches[number % len(hatches)]}
        axes.bar(places, heights, bottom=floor, width=0.8, label=task, **look)
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    # Labels of more bars than these would lie over one another; 2^0 has one always.
    step = 1 + len(places) // 10
    marked = [place for place in places if place % step == 0]
    axes.set_xticks(marked, [f"$2^{{{place}}}$" for place in marked])
    axes.set(xlabel=r"$\eta_B/\eta_A$, nearest power of two", ylabel="cells among the best")
    monitors = "/".join(sorted({result.monitor for result in results.values()}))
    tasks = f"{len(counts)} task{'s' * (len(counts) > 1)}"
    ranked = f"{rankings} ranking{'s' * (rankings > 1)} (task and seed)"
    axes.set_title(
        f"Best {best} LoRA+ cells by validation {monitors}: {tasks}, {ranked}", fontsize="medium"
    )
    axes.legend(fontsize="small")
    return _saved(axes, path)


def plot_curves(result: SweepResult, *, ax: Any = None, path: Any = None) -> Any:
    """Draws the monitored metric over the steps, for the selected cell of every arm.

    A line is the mean over the seeds, its band runs from the lowest to the highest. A horizontal
    line is the best that plain LoRA's mean reached; each arm's legend says after how many steps its
    mean reached that, if ever.

    Args:
        result: What `sweep` returned; cells need at least two looks at the validation data
            (`evaluate_every`).
        ax: Matplotlib axes to draw on; None makes a figure.
        path: Where to save the figure, if anywhere.

    Returns:
        The Matplotlib axes.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If no arm has a selected cell with a curve.

    Example:
        >>> rates = {"eta_a": 1e-4, "eta_b": 1.6e-3, "lr_ratio": 16.0, "head_rate": None}
        >>> record = {"arm": "loraplus", **rates, "seed": 0, "status": "complete", "value": 0.9,
        ...           "metrics": {}, "curve": {"steps": [10, 20], "values": [0.8, 0.9]}}
        >>> result = klp.tuning.SweepResult("accuracy", "max", [0], {}, {"loraplus": 1}, [record])
        >>> axes = klp.tuning.plot_curves(result, path="curves.png")
        >>> axes.get_legend().get_texts()[0].get_text()
        'LoRA+, eta_A 0.0001, ratio 16'
    """
    curves = {arm: curve for arm in result.arms if (curve := _curve(result, arm))}
    if not curves:
        raise ValueError(
            "No arm has a finished cell with a learning curve. Pass `evaluate_every=` to `sweep`, "
            "or call `report(step, value)` in your `train`."
        )
    axes = _axes(ax)
    better = max if result.mode == "max" else min
    goal = better(curves["lora"]["mean"]) if "lora" in curves else None
    for arm, curve in curves.items():
        cell = result.selected(arm)
        assert cell is not None
        label = f"{NAMES[arm]}, eta_A {cell['eta_a']:g}"
        label += f", ratio {cell['lr_ratio']:g}" if arm == "loraplus" else ""
        if goal is not None:
            reached = steps_to(curve["steps"], curve["mean"], goal, result.mode)
            there = "never there" if reached is None else f"there after {reached} steps"
            label += f": {there}"
        axes.plot(curve["steps"], curve["mean"], label=label, ms=4, **_STYLES[arm])
        axes.fill_between(
            curve["steps"], curve["low"], curve["high"], color=_STYLES[arm]["c"], alpha=0.15
        )
    if goal is not None:
        axes.axhline(goal, c="0.5", lw=0.8, label=f"best of plain LoRA's mean, {goal:.4g}")
    axes.set(xlabel="training steps", ylabel=f"{result.monitor} (validation)")
    count = len(result.seeds)
    axes.set_title(
        f"Each method at its own best rates; mean and range of {count} seed{'s' * (count > 1)}",
        fontsize="medium",
    )
    axes.legend(fontsize="small")
    return _saved(axes, path)


def steps_to(steps: list[int], values: list[float], goal: float, mode: str) -> int | None:
    """Returns the first step whose value is as good as the goal, or None."""
    sign = 1 if mode == "max" else -1
    return next((n for n, v in zip(steps, values, strict=True) if sign * (v - goal) >= 0), None)


def _curve(result: SweepResult, arm: str) -> dict[str, list] | None:
    """Returns steps, mean, lowest and highest of an arm's selected cell, or None."""
    cell = result.selected(arm)
    if cell is None:
        return None
    rates = ("eta_a", "eta_b", "head_rate")
    found = [
        record["curve"]
        for record in result.records
        if record["arm"] == arm and all(record[name] == cell[name] for name in rates)
    ]
    if not found or any(c["steps"] != found[0]["steps"] or len(c["steps"]) < 2 for c in found):
        return None
    columns = list(zip(*(curve["values"] for curve in found), strict=True))
    return {
        "steps": found[0]["steps"],
        "mean": [statistics.fmean(column) for column in columns],
        "low": [min(column) for column in columns],
        "high": [max(column) for column in columns],
    }


def _outlined() -> list:
    """Returns effects that keep a dark line visible on dark cells."""
    from matplotlib import patheffects

    return [patheffects.withStroke(linewidth=3, foreground="white")]


def _axes(ax: Any) -> Any:
    try:
        from matplotlib import figure
    except ImportError as error:
        raise ImportError(
            "Pictures need Matplotlib: pip install 'keras-loraplus[tuning]'."
        ) from error
    # A figure of its own, not pyplot's: it opens no window and needs no closing.
    return figure.Figure(figsize=(6.5, 5.2), layout="constrained").subplots() if ax is None else ax


def _saved(axes: Any, path: Any) -> Any:
    if path is not None:
        axes.figure.savefig(path, dpi=150)
    return axes
