"""LoRA+ for Keras 3: low-rank layers and optimizers with a learning-rate ratio."""

from keras_loraplus import callbacks, layers, optimizers, tuning
from keras_loraplus.adapters import inspect_adapter, load_adapter, load_weights, save_adapter
from keras_loraplus.adapters.peft import export_peft, import_peft
from keras_loraplus.enable import enable_lora_plus, merge_lora_plus
from keras_loraplus.layers import register_adapter, unregister_adapter
from keras_loraplus.named import (
    active_adapter,
    add_adapter,
    delete_adapter,
    list_adapters,
    set_adapter,
)
from keras_loraplus.optimizers import LoRAPlusAdamW, assignments, loraplus
from keras_loraplus.report import Report
from keras_loraplus.requantizing import requantization_errors
from keras_loraplus.switching import adapters_disabled
from keras_loraplus.version import __version__

__all__ = [
    "LoRAPlusAdamW",
    "Report",
    "__version__",
    "active_adapter",
    "adapters_disabled",
    "add_adapter",
    "assignments",
    "callbacks",
    "delete_adapter",
    "enable_lora_plus",
    "export_peft",
    "import_peft",
    "inspect_adapter",
    "layers",
    "list_adapters",
    "load_adapter",
    "load_weights",
    "loraplus",
    "merge_lora_plus",
    "optimizers",
    "register_adapter",
    "requantization_errors",
    "save_adapter",
    "set_adapter",
    "tuning",
    "unregister_adapter",
]
