"""Choosing learning rates: sweeps, pictures of them, and what to start from."""

from keras_loraplus.tuning.cells import Cell
from keras_loraplus.tuning.plots import plot_curves, plot_heatmap, plot_ratio_distribution
from keras_loraplus.tuning.result import SweepResult, load
from keras_loraplus.tuning.suggestion import Suggestion, suggest
from keras_loraplus.tuning.sweep import sweep

__all__ = [
    "Cell",
    "Suggestion",
    "SweepResult",
    "load",
    "plot_curves",
    "plot_heatmap",
    "plot_ratio_distribution",
    "suggest",
    "sweep",
]
