"""The models whose training steps are measured, with random weights.

A step's time and memory depend on the shapes alone, so no pretrained weights are fetched.
"""

import functools

import keras
import numpy as np

from benchmarks import peft_arms
from benchmarks.arms import SEED, Case

CLASSES = 8
CROSS_ENTROPY = functools.partial(keras.losses.SparseCategoricalCrossentropy, from_logits=True)
BERT_LINEAR = (
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
    "pooled_dense",
)
LLAMA_LINEAR = (
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_intermediate_dense",
    "feedforward_gate_dense",
    "feedforward_output_dense",
    "token_embedding",
)
VIT_LINEAR = ("query", "key", "value", "attention_output", "dense_1", "dense_2")

BERT_WIDE = {
    "num_layers": 4,
    "num_heads": 16,
    "hidden_dim": 1024,
    "intermediate_dim": 4096,
    "max_sequence_length": 32,
    "vocabulary_size": 1000,
}
MINILM = {
    "num_layers": 6,
    "num_heads": 12,
    "hidden_dim": 384,
    "intermediate_dim": 1536,
    "max_sequence_length": 512,
    "vocabulary_size": 30522,
}
LLAMA = {
    "vocabulary_size": 49152,
    "num_layers": 4,
    "num_query_heads": 16,
    "num_key_value_heads": 4,
    "hidden_dim": 1024,
    "intermediate_dim": 2816,
    "tie_word_embeddings": True,
}
VIT = {
    "image_shape": (224, 224, 3),
    "patch_size": 16,
    "num_layers": 6,
    "num_heads": 6,
    "hidden_dim": 384,
    "mlp_dim": 1536,
}
RESNET = {"blocks": 2, "channels": 128, "size": 28}


def token_batch(vocabulary, batch, length):
    return np.random.default_rng(SEED).integers(1, vocabulary, size=(batch, length))


def class_labels(batch):
    return np.random.default_rng(SEED + 1).integers(0, CLASSES, size=batch)


def image_batch(shape, batch):
    return np.random.default_rng(SEED).normal(size=(batch, *shape)).astype("float32")


def bert(shape, batch, length):
    """A BERT with a head of eight classes."""
    import keras_hub

    backbone = keras_hub.models.BertBackbone(**shape, dropout=0.0)
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=CLASSES, preprocessor=None, dropout=0.0
    )
    tokens = token_batch(shape["vocabulary_size"], batch, length)
    features = {
        "token_ids": tokens,
        "segment_ids": np.zeros_like(tokens),
        "padding_mask": np.ones_like(tokens),
    }
    return model, backbone, features, class_labels(batch), CROSS_ENTROPY()


def llama(shape, batch, length):
    """A Llama-shaped decoder that predicts every next token through its tied embeddings."""
    import keras_hub

    backbone = keras_hub.models.LlamaBackbone(**shape)
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    tokens = token_batch(shape["vocabulary_size"], batch, length + 1)
    features = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((batch, length), "int32")}
    return model, backbone, features, tokens[:, 1:], CROSS_ENTROPY()


def vit(shape, batch):
    """A vision transformer with a head of eight classes."""
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(**shape)
    model = keras_hub.models.ViTImageClassifier(
        backbone, num_classes=CLASSES, preprocessor=None, dropout=0.0
    )
    images = image_batch(shape["image_shape"], batch)
    return model, backbone, images, class_labels(batch), CROSS_ENTROPY()


def resnet(shape, batch):
    """Basic residual blocks of two 3 x 3 convolutions each, without normalisation, and a head."""
    channels = shape["channels"]
    inputs = x = keras.Input((shape["size"], shape["size"], channels))
    for block in range(shape["blocks"]):
        y = x
        for half in range(2):
            name = f"conv_{2 * block + half}"
            y = keras.layers.Conv2D(channels, 3, padding="same", name=name)(y)
            y = keras.layers.ReLU()(y) if half == 0 else y
        x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
    body = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, name="head")(body.output))
    images = image_batch((shape["size"], shape["size"], channels), batch)
    return model, body, images, class_labels(batch), CROSS_ENTROPY()


def conv_names(shape):
    return [f"conv_{number}" for number in range(2 * shape["blocks"])]


def bert_case(shape, batch, length, all_linear=True):
    return Case(
        build=functools.partial(bert, shape, batch, length),
        targets="all-linear" if all_linear else None,
        layers=BERT_LINEAR if all_linear else None,
        adapted=("query", "value"),
        first="embeddings_layer_norm/beta",
        peft=functools.partial(peft_arms.bert, shape, batch, length, all_linear),
    )


def llama_case(shape, batch, length):
    return Case(
        build=functools.partial(llama, shape, batch, length),
        targets=list(LLAMA_LINEAR),
        layers=LLAMA_LINEAR,
        first=".*/self_attention_layernorm/scale",
        peft=functools.partial(peft_arms.llama, shape, batch, length),
    )


def vit_case(shape, batch):
    return Case(
        build=functools.partial(vit, shape, batch),
        targets="all-linear",
        layers=VIT_LINEAR,
        first=".*/transformer_block_1/ln_1/beta",
        peft=functools.partial(peft_arms.vit, shape, batch),
    )


def resnet_case(shape, batch):
    return Case(
        build=functools.partial(resnet, shape, batch),
        targets=conv_names(shape),
        layers=conv_names(shape),
        first="conv_0/bias",
        peft=functools.partial(peft_arms.resnet, shape, batch),
    )


TINY_BERT = {
    **MINILM,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "vocabulary_size": 50,
}
TINY_LLAMA = {
    **LLAMA,
    "num_layers": 1,
    "vocabulary_size": 50,
    "hidden_dim": 32,
    "intermediate_dim": 48,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
}
TINY_VIT = {
    "image_shape": (32, 32, 3),
    "patch_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 16,
    "mlp_dim": 32,
}
TINY_RESNET = {"blocks": 1, "channels": 8, "size": 6}

MODELS = {
    "bert_wide": functools.partial(bert_case, BERT_WIDE, 8, 32),
    "minilm_qv": functools.partial(bert_case, MINILM, 8, 64, all_linear=False),
    "minilm_all": functools.partial(bert_case, MINILM, 8, 64),
    "llama": functools.partial(llama_case, LLAMA, 2, 64),
    "vit": functools.partial(vit_case, VIT, 2),
    "resnet": functools.partial(resnet_case, RESNET, 4),
}
# The same arms on models that step at once, for tests.
TINY = {
    "tiny_bert": functools.partial(bert_case, TINY_BERT, 2, 8),
    "tiny_bert_qv": functools.partial(bert_case, TINY_BERT, 2, 8, all_linear=False),
    "tiny_llama": functools.partial(llama_case, TINY_LLAMA, 2, 8),
    "tiny_vit": functools.partial(vit_case, TINY_VIT, 2),
    "tiny_resnet": functools.partial(resnet_case, TINY_RESNET, 2),
}
