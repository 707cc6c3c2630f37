"""What the reproductions share: records of how a result came about, and plain pictures."""

import math
import os
import pathlib
import platform
import sys
from importlib import metadata

RESULTS = pathlib.Path(__file__).with_name("results")
# The examples beside this folder.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))


def versions(*packages):
    """Returns the versions of python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(seconds):
    """Returns what a run time is worth: the seconds, the cores, and how busy they were."""
    # Another process on the cores makes a run longer than it has to be. Own time and that of
    # workers that have ended:
    used = os.times()
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(sum(used[:4]), 1),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }


def plain(value):
    """Returns a number for JSON, which knows no infinities; None for what is not finite."""
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def pyplot():
    """Returns matplotlib's pyplot without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def heatmap(axes, values, eta_a, eta_b, *, best, title, shade=None):
    """Draws a table of losses over two rates, the best cells marked and equal ratios drawn.

    Args:
        axes: Matplotlib axes.
        values: Array (eta_b, eta_a); what is not finite is hatched.
        eta_a: Rates of A, rising by a constant factor.
        eta_b: Rates of B, likewise.
        best: Number of cells that are marked, the best one by a star.
        title: Title of the axes.
        shade: What is shown in grey; None: the logarithm of the values to base 10,
            of those above 1 as of 1.

    Returns:
        The image, for a colour bar.
    """
    import numpy as np

    log_a, log_b = np.log2(eta_a), np.log2(eta_b)
    half_a, half_b = (np.diff(logs[:2])[0] / 2 if len(logs) > 1 else 0.5 for logs in (log_a, log_b))
    if shade is None:
        # Just before training diverges losses are huge, and would leave no grey for the others.
        shade = np.log10(np.where(np.isfinite(values), np.clip(values, 1e-12, 1.0), np.nan))
    image = axes.imshow(
        shade,
        origin="lower",
        extent=(log_a[0] - half_a, log_a[-1] + half_a, log_b[0] - half_b, log_b[-1] + half_b),
        cmap="Greys",
        aspect="auto",
    )
    axes.set_facecolor("white")
    axes.patch.set_hatch("////")
    order = np.argsort(np.where(np.isfinite(values), values, np.inf), axis=None)
    order = order[: min(best, np.isfinite(values).sum())]
    rows, columns = np.unravel_index(order, values.shape)
    axes.plot(log_a[columns[1:]], log_b[rows[1:]], "o", mec="black", mfc="white", ms=5)
    axes.plot(log_a[columns[:1]], log_b[rows[:1]], "*", mec="black", mfc="white", ms=13)
    low, high = axes.get_xlim(), axes.get_ylim()
    for ratio, style in ((1, "-"), (16, ":")):
        line = np.array(low)
        axes.plot(line, line + np.log2(ratio), style, color="black", lw=0.9)
    axes.set_xlim(low)
    axes.set_ylim(high)
    axes.set_xlabel(r"$\log_2\ \eta_A$")
    axes.set_ylabel(r"$\log_2\ \eta_B$")
    axes.set_title(title, fontsize="small")
    return image
