"""LoRA+ layers: Keras layers with a frozen kernel and two thin trained factors."""

from keras_loraplus.layers.adapter_types import (
    kind_of,
    lora_class_for,
    register_adapter,
    unregister_adapter,
)
from keras_loraplus.layers.base import LowRankLayer, is_adapted
from keras_loraplus.layers.conv import LoRAPlusConv1D, LoRAPlusConv2D, LoRAPlusConv3D
from keras_loraplus.layers.dense import LoRAPlusDense
from keras_loraplus.layers.einsum_dense import LoRAPlusEinsumDense
from keras_loraplus.layers.embedding import LoRAPlusEmbedding, LoRAPlusReversibleEmbedding
from keras_loraplus.layers.matrix_adapter import MatrixAdapter
from keras_loraplus.layers.spec import AdapterSpec

# Registers the loader of adopted layers, so that a saved model loads after the import alone.
from keras_loraplus.layers.adopt import adopt, release, why_not_adoptable  # isort: skip
from keras_loraplus.layers import built_in as built_in  # isort: skip

__all__ = [
    "AdapterSpec",
    "LoRAPlusConv1D",
    "LoRAPlusConv2D",
    "LoRAPlusConv3D",
    "LoRAPlusDense",
    "LoRAPlusEinsumDense",
    "LoRAPlusEmbedding",
    "LoRAPlusReversibleEmbedding",
    "LowRankLayer",
    "MatrixAdapter",
    "adopt",
    "is_adapted",
    "kind_of",
    "lora_class_for",
    "register_adapter",
    "release",
    "unregister_adapter",
    "why_not_adoptable",
]
