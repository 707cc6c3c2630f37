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
