"""LoRA+ for Keras 3: low-rank layers and optimizers with a learning-rate ratio."""

from keras_loraplus import layers, optimizers
from keras_loraplus.adapters import load_adapter, save_adapter
from keras_loraplus.enable import enable_lora_plus, merge_lora_plus
from keras_loraplus.optimizers import LoRAPlusAdamW, assignments, loraplus
from keras_loraplus.report import Report
from keras_loraplus.switching import adapters_disabled

__version__ = "0.1.0"

__all__ = [
    "LoRAPlusAdamW",
    "Report",
    "adapters_disabled",
    "assignments",
    "enable_lora_plus",
    "layers",
    "load_adapter",
    "loraplus",
    "merge_lora_plus",
    "optimizers",
    "save_adapter",
]
