"""Optimizers that give each side of a low-rank adapter its own learning rate."""

from keras_loraplus.optimizers.adamw import LoRAPlusAdamW
from keras_loraplus.optimizers.assignments import assignments
from keras_loraplus.optimizers.factory import loraplus

__all__ = ["LoRAPlusAdamW", "assignments", "loraplus"]
