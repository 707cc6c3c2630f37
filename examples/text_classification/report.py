"""Learning curves as a picture, results as a table and as JSON."""

import json
import os

import numpy as np

NAMES = {"loraplus": "LoRA+", "lora": "LoRA", "full": "full fine-tuning"}
COLORS = {"loraplus": "tab:blue", "lora": "tab:orange", "full": "tab:green"}
WINDOW = 15


def smooth(values, window=WINDOW):
    """Returns the mean of each value and those before it, at most `window` of them."""
    sums = np.cumsum(np.insert(np.asarray(values, dtype="float64"), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_curves(results, path, title):
    """Draws loss and accuracy over the training steps of one or more methods."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for result in results:
        method, curves = result["method"], result["curves"]
        steps = len(curves["loss"])
        if not steps:
            continue
        color, name = COLORS[method], NAMES[method]
        epochs = len(curves["validation_loss"])
        ends = np.arange(1, epochs + 1) * steps / epochs
        for axis, key in zip(axes, ("loss", "accuracy"), strict=True):
            train = smooth(curves[key])
            axis.plot(np.arange(1, steps + 1), train, color=color, label=f"{name}, training")
            held_out = curves[f"validation_{key}"]
            axis.plot(ends, held_out, "o", color=color, label=f"{name}, held out, after an epoch")
        axes[1].axhline(
            result["test_accuracy"],
            color=color,
            linestyle=":",
            label=f"{name}, test: {result['test_accuracy']:.1%}",
        )
    axes[0].set(title="Cross-entropy", xlabel="step", yscale="log")
    axes[1].set(title="Accuracy", xlabel="step", ylim=(None, 1.005))
    axes[1].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    for axis, place in zip(axes, ("upper right", "lower right"), strict=True):
        axis.grid(alpha=0.3)
        axis.legend(loc=place, fontsize="small")
    figure.suptitle(
        f"{title} (training curves: mean of the last {WINDOW} steps)", fontsize="medium"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def results_table(results):
    """Returns a table with one line a method."""
    header = ["method", "test accuracy", "trainable", "seconds", "rate of A", "rate of B", "head"]
    rows = [header]
    for result in results:
        rates = result["rates"]
        base = rates["learning_rate"]
        factors = ("-", "-") if result["method"] == "full" else (1.0, rates["lr_ratio"])
        rows.append(
            [
                NAMES[result["method"]],
                f"{result['test_accuracy']:.2%}",
                f"{result['trainable_parameters']:,}",
                f"{result['curves']['seconds']:.0f}",
                *(factor if factor == "-" else f"{factor * base:.2g}" for factor in factors),
                f"{base * rates['head_multiplier']:.2g}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if any(result["method"] == "full" for result in results):
        lines.append("full fine-tuning has no A and B; its backbone trains at the base rate.")
    return "\n".join(lines)


def write_json(content, path):
    """Writes JSON under another name first, so that an interrupted run leaves no broken file."""
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    os.replace(partial, path)
