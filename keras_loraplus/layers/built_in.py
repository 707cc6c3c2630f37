"""Enters the adapters of Keras's layers, and of KerasHub's banks of experts, in the table."""

import keras

from keras_loraplus import _compat
from keras_loraplus.layers import adapter_types, experts
from keras_loraplus.layers.adapter_types import register_adapter
from keras_loraplus.layers.conv import LoRAPlusConv1D, LoRAPlusConv2D, LoRAPlusConv3D
from keras_loraplus.layers.dense import LoRAPlusDense
from keras_loraplus.layers.einsum_dense import LoRAPlusEinsumDense
from keras_loraplus.layers.embedding import LoRAPlusEmbedding, LoRAPlusReversibleEmbedding

register_adapter(keras.layers.Dense, LoRAPlusDense, kind=adapter_types.LINEAR)
register_adapter(keras.layers.EinsumDense, LoRAPlusEinsumDense, kind=adapter_types.LINEAR)
register_adapter(keras.layers.Embedding, LoRAPlusEmbedding)
register_adapter(keras.layers.ReversibleEmbedding, LoRAPlusReversibleEmbedding)
register_adapter(keras.layers.Conv1D, LoRAPlusConv1D, kind=adapter_types.CONVOLUTION)
register_adapter(keras.layers.Conv2D, LoRAPlusConv2D, kind=adapter_types.CONVOLUTION)
register_adapter(keras.layers.Conv3D, LoRAPlusConv3D, kind=adapter_types.CONVOLUTION)

for name, adapter in experts.ADAPTERS.items():
    # Not even "all-linear": PEFT's leaves banks of experts out too, and they are most of a model.
    register_adapter(_compat.HUB_EXPERTS[name], adapter, kind=adapter_types.NAMED)

for cell in (keras.layers.SimpleRNNCell, keras.layers.GRUCell, keras.layers.LSTMCell):
    register_adapter(cell, reason="its kernels are read step by step inside of a recurrence")

for name, reason in _compat.HUB_NOT_ADAPTABLE.items():
    register_adapter(name, reason=reason)
