"""The paper's toy model: which learning rates of A and B does plain gradient descent like best?

    python examples/reproduce/toy.py

    f(x) = W_out relu(B A relu(W_in x)),  x in R^5, n = 100, r = 4,  target sin(mean of x)

Only A and B train, by full-batch gradient descent on the mean squared error of 1000 points; the
loss on 100 other points is read after 10 and after 200 steps, for each pair of rates and each of
three seeds (of data and weights). numpy only; writes results/toy.json and one picture an init.

All weights are normal, of variance 1 over the number of inputs. A product B A of zero, as an
adapter begins with, would be a point where relu has no slope, and nothing would train. So one
factor is scaled to a hundredth: A (`loraplus`, the article's advice) or B (`lora`), or none
(`both`).
"""

import argparse
import concurrent.futures
import itertools
import os
import time

import common
import numpy as np

from text_classification import report

INPUTS, WIDTH, RANK = 5, 100, 4
TRAIN, TEST = 1000, 100
READ_AFTER = (10, 200)
# Steps of a factor of two; the best cell lies inside, see `edge` in the results.
ETA_A = 2.0 ** np.arange(-12, 5)
ETA_B = 2.0 ** np.arange(-9, 11)
SCALES = {"loraplus": (0.01, 1.0), "lora": (1.0, 0.01), "both": (1.0, 1.0)}


def setting(seed, init):
    """Returns hidden values and targets of both sets, A, B and W_out of one seed."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(TRAIN + TEST, INPUTS))
    targets = np.sin(x.mean(axis=1))
    w_in = rng.normal(size=(INPUTS, WIDTH)) / np.sqrt(INPUTS)
    w_out = rng.normal(size=WIDTH) / np.sqrt(WIDTH)
    scale_a, scale_b = SCALES[init]
    a = scale_a * rng.normal(size=(WIDTH, RANK)) / np.sqrt(WIDTH)
    b = scale_b * rng.normal(size=(RANK, WIDTH)) / np.sqrt(RANK)
    hidden = np.maximum(x @ w_in, 0.0)
    return [value.astype("float32") for value in (hidden, targets, a, b, w_out)]


def gradients(hidden, targets, a, b, w_out):
    """Returns the loss and its gradients for A (n, r) and B (r, n)."""
    inner = hidden @ a  # (points, r)
    before = inner @ b  # (points, n)
    active = (before > 0).astype(before.dtype)
    error = np.maximum(before, 0.0) @ w_out - targets
    # The slope for `before` is active * w_out * scaled; its factors are put where arrays are thin.
    scaled = (2.0 / len(targets) * error)[:, None]
    slope_a = hidden.T @ (scaled * (active @ (w_out[:, None] * b.T)))
    slope_b = ((scaled * inner).T @ active) * w_out
    return np.mean(error**2), slope_a, slope_b


def loss(hidden, targets, a, b, w_out):
    return np.mean((np.maximum(hidden @ a @ b, 0.0) @ w_out - targets) ** 2)


def descend(hidden, targets, a, b, w_out, eta_a, eta_b, read_after=READ_AFTER):
    """Returns the test losses after some numbers of steps; infinite where training diverged."""
    train, test = (hidden[:TRAIN], targets[:TRAIN]), (hidden[TRAIN:], targets[TRAIN:])
    losses = []
    for step in range(max(read_after)):
        now, slope_a, slope_b = gradients(*train, a, b, w_out)
        if not now < 1e6:
            break
        a, b = a - eta_a * slope_a, b - eta_b * slope_b
        if step + 1 in read_after:
            losses.append(loss(*test, a, b, w_out))
    losses = [value if np.isfinite(value) and value < 1e6 else np.inf for value in losses]
    return losses + [np.inf] * (len(read_after) - len(losses))


def grid(job):
    """Returns test losses of an (init, seed), an array (read after, eta_b, eta_a)."""
    init, seed = job
    hidden, targets, a, b, w_out = setting(seed, init)
    with np.errstate(over="ignore", invalid="ignore"):
        cells = [
            [
                descend(hidden, targets, a, b, w_out, np.float32(eta_a), np.float32(eta_b))
                for eta_a in ETA_A
            ]
            for eta_b in ETA_B
        ]
    return np.moveaxis(np.array(cells), -1, 0)


def summary(losses):
    """Returns the best cell of a table of losses, and the ratios of the best four."""
    order = np.argsort(losses, axis=None)[:4]
    cells = [tuple(map(int, np.unravel_index(i, losses.shape))) for i in order]
    row, column = cells[0]
    equal = [losses[i, j] for i, j in np.ndindex(*losses.shape) if ETA_B[i] == ETA_A[j]]
    near = [
        ETA_B[i] / ETA_A[j]
        for i, j in np.ndindex(*losses.shape)
        if losses[i, j] <= 1.1 * losses[row, column]
    ]
    return {
        "eta_a": float(ETA_A[column]),
        "eta_b": float(ETA_B[row]),
        "ratio": float(ETA_B[row] / ETA_A[column]),
        "loss": common.plain(losses[row, column]),
        "best_loss_at_equal_rates": common.plain(min(equal)),
        "ratios_of_best_four": [float(ETA_B[i] / ETA_A[j]) for i, j in cells],
        "ratios_within_10_percent_of_best": [float(min(near)), float(max(near))],
        "edge": bool(row in (0, len(ETA_B) - 1) or column in (0, len(ETA_A) - 1)),
    }


def heatmap(axes, losses, title):
    """Draws losses, an array (eta_b, eta_a); returns the image, for a colour bar.

    The grid is too fine for the squares of klp.tuning.plot_heatmap, and numpy is all it needs.
    """
    log_a, log_b = np.log2(ETA_A), np.log2(ETA_B)
    # Just before training diverges losses are huge, and would leave no grey for the others.
    shade = np.log10(np.where(np.isfinite(losses), np.clip(losses, 1e-12, 1.0), np.nan))
    image = axes.imshow(
        shade,
        origin="lower",
        extent=(log_a[0] - 0.5, log_a[-1] + 0.5, log_b[0] - 0.5, log_b[-1] + 0.5),
        cmap="Greys",
        aspect="auto",
    )
    axes.set_facecolor("white")
    axes.patch.set_hatch("////")
    rows, columns = np.unravel_index(np.argsort(losses, axis=None)[:4], losses.shape)
    axes.plot(log_a[columns[1:]], log_b[rows[1:]], "o", mec="black", mfc="white", ms=5)
    axes.plot(log_a[columns[:1]], log_b[rows[:1]], "*", mec="black", mfc="white", ms=13)
    low, high = axes.get_xlim(), axes.get_ylim()
    for ratio, style in ((1, "-"), (16, ":")):
        line = np.array(low)
        axes.plot(line, line + np.log2(ratio), style, color="black", lw=0.9)
    axes.set(xlim=low, ylim=high, xlabel=r"$\log_2\ \eta_A$", ylabel=r"$\log_2\ \eta_B$")
    axes.set_title(title, fontsize="small")
    return image


def draw(tables, path, init):
    pyplot = common.pyplot()
    seeds = len(tables)
    figure, axes = pyplot.subplots(
        len(READ_AFTER), seeds, figsize=(3.4 * seeds, 6.4), squeeze=False, layout="constrained"
    )
    for column, (seed, losses) in enumerate(tables.items()):
        for row, steps in enumerate(READ_AFTER):
            best = summary(losses[row])
            title = f"{steps} steps, seed {seed}: best ratio {best['ratio']:g}"
            image = heatmap(axes[row][column], losses[row], title)
            figure.colorbar(image, ax=axes[row][column], label=r"$\log_{10}$ test loss")
    figure.suptitle(
        f"Toy model, init {init}: test loss over the rates of A and B.\nStar: best cell, circles: "
        "next three, hatched: diverged. Lines: ratio 1 (solid), 16 (dotted)",
        fontsize="small",
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--inits", choices=SCALES, nargs="+", default=list(SCALES))
    parser.add_argument("--output", default=common.RESULTS / "toy", help="path without an ending")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    jobs = list(itertools.product(options.inits, options.seeds))
    with concurrent.futures.ProcessPoolExecutor(options.workers) as pool:
        found = dict(zip(jobs, pool.map(grid, jobs), strict=True))
    tables = {init: {seed: found[init, seed] for seed in options.seeds} for init in options.inits}
    for init, losses in tables.items():
        draw(losses, f"{options.output}_{init}.png", init)
    each = [
        (losses[i], {"init": init, "seed": seed, "steps": steps})
        for init, seeds in tables.items()
        for seed, losses in seeds.items()
        for i, steps in enumerate(READ_AFTER)
    ]
    content = {
        "setting": {
            "inputs": INPUTS,
            "width": WIDTH,
            "rank": RANK,
            "train_points": TRAIN,
            "test_points": TEST,
            "optimizer": "full-batch gradient descent",
            "scales_of_a_and_b": SCALES,
        },
        "eta_a": ETA_A.tolist(),
        "eta_b": ETA_B.tolist(),
        "best": [{**which, **summary(losses)} for losses, which in each],
        "run": common.machine(time.perf_counter() - start),
        "versions": common.versions("numpy", "matplotlib"),
        "losses": [
            {**which, "rows_are_eta_b": [[common.plain(value) for value in row] for row in losses]}
            for losses, which in each
        ],
    }
    report.write_json(content, f"{options.output}.json")
    for row in content["best"]:
        print(
            "{init:8s} seed {seed}, {steps:3d} steps: best eta_A {eta_a:g}, eta_B {eta_b:g}, ratio "
            "{ratio:g}, loss {loss:.4g}; at equal rates {best_loss_at_equal_rates:.4g}"
            "{}".format(" (on the edge)" if row["edge"] else "", **row)
        )
    print(f"{content['run']['seconds']:.0f} seconds; {options.output}.json")


if __name__ == "__main__":
    main()
