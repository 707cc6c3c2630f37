"""Pictures of sweeps: what is marked, drawn and said."""

import numpy as np
import pytest

from keras_loraplus import tuning

RATES = [1e-4, 1e-3, 1e-2]


def made_up(values, status="complete"):
    """Returns a sweep of 3 x 3 cells and two seeds; `values` by (eta_a, eta_b)."""
    records = [
        {
            **{"arm": "loraplus", "eta_a": a, "eta_b": b, "lr_ratio": b / a, "head_rate": None},
            **{"seed": seed, "status": status, "value": values[i][j] + 0.001 * seed},
            **{"metrics": {}, "error": None, "curve": {"steps": [], "values": []}, "seconds": 0.0},
        }
        for i, a in enumerate(RATES)
        for j, b in enumerate(RATES)
        for seed in (0, 1)
    ]
    axes = {"loraplus": {"eta_a": RATES, "eta_b": RATES}}
    return tuning.SweepResult("accuracy", "max", [0, 1], axes, {"loraplus": 9}, records)


VALUES = [[0.5, 0.6, 0.9], [0.7, 0.8, 0.895], [0.6, 0.3, 0.2]]


def points(axes, label):
    return [
        [tuple(point) for point in part.get_offsets()]
        for part in axes.collections
        if part.get_label() == label
    ]


def test_heatmap_marks_cells_and_lines(tmp_path):
    result = made_up(VALUES)
    for record in result.records[-2:]:
        record["status"] = "diverged"
    axes = tuning.plot_heatmap(result, path=tmp_path / "heatmap.png")
    assert points(axes, "best cell") == [[(1e-4, 1e-2)]]
    assert points(axes, "within 1 % of it") == [[(1e-3, 1e-2)]]
    assert points(axes, "not finished") == [[(1e-2, 1e-2)]]
    ratios = [np.asarray(line.get_ydata()) / line.get_xdata() for line in axes.lines]
    np.testing.assert_allclose(ratios, [[r, r] for r in (1, 8, 16, 32)])
    assert axes.get_xscale() == axes.get_yscale() == "log"
    for part in ("accuracy", "loraplus", "2 seeds", "9 cells"):
        assert part in axes.get_title()
    assert (tmp_path / "heatmap.png").stat().st_size > 1000


def test_heatmap_without_finished_cells():
    with pytest.raises(ValueError, match="no cell of 'loraplus'"):
        tuning.plot_heatmap(made_up(VALUES, status="failed"))


def test_heatmap_of_an_arm_with_one_rate():
    with pytest.raises(ValueError, match="`arm` must be"):
        tuning.plot_heatmap(made_up(VALUES), arm="full")


def test_labels_of_ratios_do_not_overlap():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(3.2, 3.0), layout="constrained")
    tuning.plot_ratio_distribution({"R8": made_up(VALUES)}, best=9, ax=axes)
    figure.canvas.draw()
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    assert len(boxes) >= 5 and "$2^{0}$" in [label.get_text() for label in labels]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    pyplot.close(figure)


def test_ratios_of_the_best_cells_are_counted_by_task_and_seed(tmp_path):
    one, other = made_up(VALUES), made_up([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    results = {"R8": one, "CoLA": other}
    axes = tuning.plot_ratio_distribution(results, best=2, path=tmp_path / "ratios.png")
    heights = {}
    for task, bars in zip(results, axes.containers, strict=True):
        found = {round(b.get_x() + b.get_width() / 2): b.get_height() for b in bars}
        heights[task] = {place: n for place, n in found.items() if n}
    # The two best of R8: B over A 100 and 10; of CoLA: 1 and 1/10. Two seeds each.
    assert heights == {"R8": {7: 2, 3: 2}, "CoLA": {0: 2, -3: 2}}
    assert "2 tasks, 4 rankings" in axes.get_title() and "accuracy" in axes.get_title()
    assert (tmp_path / "ratios.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="'R8' has no finished"):
        tuning.plot_ratio_distribution({"R8": made_up(VALUES, status="failed")})
    with pytest.raises(ValueError, match="Received none"):
        tuning.plot_ratio_distribution({})


def with_curves():
    rates = {"loraplus": (1e-3, 1e-2), "lora": (1e-3, 1e-3), "full": (1e-4, None)}
    means = {"loraplus": [0.5, 0.8, 0.9], "lora": [0.4, 0.6, 0.8], "full": [0.3, 0.5, 0.7]}
    records = [
        {
            **{"arm": arm, "eta_a": a, "eta_b": b, "lr_ratio": b and b / a, "head_rate": None},
            **{"seed": seed, "status": "complete", "value": means[arm][-1] + shift},
            **{"metrics": {}, "error": None, "seconds": 0.0},
            "curve": {"steps": [10, 20, 30], "values": [v + shift for v in means[arm]]},
        }
        for arm, (a, b) in rates.items()
        for seed, shift in ((0, -0.05), (1, 0.05))
    ]
    budget = dict.fromkeys(rates, 1)
    return tuning.SweepResult("accuracy", "max", [0, 1], dict.fromkeys(rates, {}), budget, records)


def test_curves_are_means_with_ranges_and_say_when_plain_lora_is_reached(tmp_path):
    axes = tuning.plot_curves(with_curves(), path=tmp_path / "curves.png")
    lines = {line.get_label(): line for line in axes.lines}
    labels = [
        "LoRA+, eta_A 0.001, ratio 10: there after 20 steps",
        "LoRA, eta_A 0.001: there after 30 steps",
        "full fine-tuning, eta_A 0.0001: never there",
        "best of plain LoRA's mean, 0.8",
    ]
    assert list(lines) == labels
    np.testing.assert_allclose(lines[labels[0]].get_ydata(), [0.5, 0.8, 0.9])
    assert len({lines[label].get_linestyle() for label in labels[:3]}) == 3
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(0.45) and band.max() == pytest.approx(0.95)
    assert "2 seeds" in axes.get_title() and "accuracy" in axes.get_ylabel()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="evaluate_every"):
        tuning.plot_curves(made_up(VALUES))
