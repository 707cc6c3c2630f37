"""Adapters that outlive the process: save, load and inspect."""

from keras_loraplus.adapters.inspection import Inspection, inspect_adapter
from keras_loraplus.adapters.native import load_adapter, save_adapter
from keras_loraplus.adapters.weights import load_weights

__all__ = ["Inspection", "inspect_adapter", "load_adapter", "load_weights", "save_adapter"]
