"""How the best rates of A and B move with the width of the layer, for Adam.

    python examples/reproduce/width.py

    f(x) = w_out . relu((W + A B) relu(W_in x)),   rank 4,   target sin(mean of x),   x in R^5

W (n, n) is frozen, as are W_in and w_out; A and B train by full-batch Adam on the squared error of
64 points. For each width n, each init and each seed every pair of rates is tried. A pair's loss is
the mean over the last 10 of 60 steps, and the geometric mean over the seeds, since oscillations are
not what is compared. The paper's theory (theorem 1): the best eta_A falls as 1/n, the best eta_B
does not move: exponents -1 and 0.

w_out is normal with variance 1 / n^2: a change of order one in all n activations, aligned by the
training, then changes f by order one, which the theory takes for granted of what follows the layer.
numpy only; writes results/width.json and results/width.png.
"""

import argparse
import concurrent.futures
import itertools
import os
import time

import common
import numpy as np

from text_classification import report

INPUTS, RANK, POINTS, STEPS, READ = 5, 4, 64, 60, 10
WIDTHS = (64, 256, 1024, 4096)
ETA_A = 2.0 ** np.arange(-14, 1)
ETA_B = 2.0 ** np.arange(-9, 4)
INITS = ("loraplus", "lora")
THEORY = {"eta_a": -1.0, "eta_b": 0.0}
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-12
BEST = 4


def setting(width, seed):
    """Returns z, z W, the targets and w_out of one width and seed."""
    rng = np.random.default_rng([seed, width])
    x = rng.normal(size=(POINTS, INPUTS))
    z = np.maximum(x @ rng.normal(size=(INPUTS, width)) / np.sqrt(INPUTS), 0.0)
    through = z @ (rng.normal(size=(width, width)) / np.sqrt(width))
    w_out = rng.normal(size=width) / width
    values = (z, through, np.sin(x.mean(axis=1)), w_out)
    return tuple(value.astype("float32") for value in values)


def factors(width, init, seed):
    """Returns A (n, r) and B (r, n) as `init=` of the package makes them."""
    rng = np.random.default_rng([seed, width, 1])
    a, b = np.zeros((width, RANK), "float32"), np.zeros((RANK, width), "float32")
    if init == "loraplus":
        b = rng.uniform(-1, 1, size=b.shape).astype("float32") / np.float32(np.sqrt(RANK))
    else:
        a = rng.uniform(-1, 1, size=a.shape).astype("float32") / np.float32(np.sqrt(width))
    return a, b


def final_loss(data, a, b, eta_a, eta_b, steps=STEPS):
    """Returns the mean loss of the last steps of Adam; 1, as if untrained, where it is worse."""
    z, through, targets, w_out = data
    values, rates = [a, b], (np.float32(eta_a), np.float32(eta_b))
    first, second = [np.zeros_like(v) for v in values], [np.zeros_like(v) for v in values]
    losses = []
    for step in range(1, steps + 1):
        inner = z @ values[0]  # (points, r)
        before = through + inner @ values[1]  # (points, n)
        error = np.maximum(before, 0.0) @ w_out - targets
        losses.append(float(np.mean(error**2)))
        if not losses[-1] < 1e6:
            return 1.0
        slope = np.where(before > 0, w_out, np.float32(0))
        slope *= (np.float32(2 / len(targets)) * error)[:, None]
        gradients = (z.T @ (slope @ values[1].T), inner.T @ slope)
        rate = np.float32(np.sqrt(1 - BETA_2**step) / (1 - BETA_1**step))
        for i, gradient in enumerate(gradients):
            first[i] = BETA_1 * first[i] + (1 - BETA_1) * gradient
            second[i] = BETA_2 * second[i] + (1 - BETA_2) * gradient**2
            values[i] = values[i] - rates[i] * rate * first[i] / (np.sqrt(second[i]) + EPSILON)
    return min(float(np.mean(losses[-READ:])), 1.0)


def grid(job):
    """Returns the losses of a width, an init and a seed, an array (eta_b, eta_a)."""
    width, init, seed = job
    data, (a, b) = setting(width, seed), factors(width, init, seed)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array(
            [[final_loss(data, a, b, eta_a, eta_b) for eta_a in ETA_A] for eta_b in ETA_B]
        )


def best_of(losses):
    """Returns the best cell, and the geometric mean of the rates of the best few."""
    rows, columns = np.unravel_index(np.argsort(losses, axis=None)[:BEST], losses.shape)
    a, b = ETA_A[columns], ETA_B[rows]
    return {
        "eta_a": float(a[0]),
        "eta_b": float(b[0]),
        "loss": common.plain(losses[rows[0], columns[0]]),
        "loss_at_equal_rates": common.plain(
            min(losses[i, j] for i, j in np.ndindex(*losses.shape) if ETA_B[i] == ETA_A[j])
        ),
        "mean_eta_a": common.plain(2 ** np.log2(a).mean()),
        "mean_eta_b": common.plain(2 ** np.log2(b).mean()),
        "edge": bool(
            rows[0] in (0, len(ETA_B) - 1) or columns[0] in (0, len(ETA_A) - 1)
        ),
    }  # fmt: skip


def exponent(rows, name):
    """Returns the least-squares exponent of the width and its standard error."""
    x = np.log2([row["width"] for row in rows])
    y = np.log2([row[f"mean_{name}"] for row in rows])
    slope, constant = np.polyfit(x, y, 1)
    residual = y - slope * x - constant
    error = np.sqrt(np.sum(residual**2) / (len(x) - 2) / np.sum((x - x.mean()) ** 2))
    return {"exponent": common.plain(slope), "standard_error": common.plain(error)}


def draw(rows, exponents, path):
    pyplot = common.pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axis, init in zip(axes, INITS, strict=True):
        mine = [row for row in rows if row["init"] == init]
        if not mine:
            continue
        for name, marker, style in (("eta_a", "o", "-"), ("eta_b", "s", "--")):
            widths = np.array([row["width"] for row in mine])
            means = np.log2([row[f"mean_{name}"] for row in mine])
            letter = name[-1].upper()
            fitted = exponents[init][name]
            label = (
                rf"$\eta_{letter}$: exponent {fitted['exponent']:.2f} "
                rf"$\pm$ {fitted['standard_error']:.2f} (theory {THEORY[name]:g})"
            )
            axis.plot(np.log2(widths), means, "k" + marker, ls=style, label=label)
            for row in mine:
                singles = np.log2([single[f"mean_{name}"] for single in row["single_seeds"]])
                axis.plot([np.log2(row["width"])] * len(singles), singles, marker, c="0.7", ms=4)
        axis.set(title=f"init {init}", xlabel=r"$\log_2$ width")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(r"$\log_2$ rate (geometric mean of the best four cells)")
    figure.suptitle(
        f"Best rates after {STEPS} steps of Adam over the width; black: from the mean of the "
        "seeds, grey: from each alone",
        fontsize="small",
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", default=common.RESULTS / "width", help="path without an ending")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    jobs = list(itertools.product(sorted(options.widths), INITS, options.seeds))
    with concurrent.futures.ProcessPoolExecutor(options.workers) as pool:
        tables = dict(zip(jobs, pool.map(grid, jobs), strict=True))
    rows, means = [], []
    for init, width in itertools.product(INITS, sorted(options.widths)):
        each = [tables[width, init, seed] for seed in options.seeds]
        losses = np.exp(np.mean(np.log(each), axis=0))
        single = [best_of(table) for table in each]
        rows.append({"init": init, "width": width, **best_of(losses), "single_seeds": single})
        shown = [[common.plain(value) for value in row] for row in losses]
        means.append({"init": init, "width": width, "rows_are_eta_b": shown})
    exponents = {
        init: {name: exponent([r for r in rows if r["init"] == init], name) for name in THEORY}
        for init in INITS
    }
    content = {
        "setting": {
            "rank": RANK,
            "points": POINTS,
            "steps": STEPS,
            "optimizer": "full-batch Adam",
            "beta_1": BETA_1,
            "beta_2": BETA_2,
            "epsilon": EPSILON,
            "seeds": options.seeds,
            "fitted": f"geometric mean of the rates of the best {BEST} cells, seeds averaged",
        },
        "eta_a": ETA_A.tolist(),
        "eta_b": ETA_B.tolist(),
        "exponents": exponents,
        "theory": THEORY,
        "best": rows,
        "run": common.machine(time.perf_counter() - start),
        "versions": common.versions("numpy", "matplotlib"),
        "losses": means,
    }
    report.write_json(content, f"{options.output}.json")
    draw(rows, exponents, f"{options.output}.png")
    for init, names in exponents.items():
        for name, found in names.items():
            print(
                f"init {init}, best {name}: width ** {found['exponent']:.2f} (standard error "
                f"{found['standard_error']:.2f}); the theory has {THEORY[name]:g}"
            )
    print(f"{content['run']['seconds']:.0f} seconds; {options.output}.json")


if __name__ == "__main__":
    main()
