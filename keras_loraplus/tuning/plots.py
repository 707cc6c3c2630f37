"""Pictures of sweeps, readable in grey."""

from typing import Any

from keras_loraplus.tuning.result import SweepResult

_LINES = ((1, "-"), (8, "--"), (16, "-."), (32, ":"))


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
        axes.plot([low, high], [low * ratio, high * ratio], style, c="0.2", lw=1, label=label)
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
