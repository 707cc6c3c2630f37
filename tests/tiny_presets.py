"""A KerasHub preset folder that is small and random, with a tokenizer."""

import numpy as np


def save_bert(folder, words, **settings):
    """Writes a random BERT whose weights differ enough for words to look different.

    The same start on each backend, and far from Keras's small one, in which words look alike.

    Args:
        folder: Where to write.
        words: What the tokenizer knows besides its special tokens.
        **settings: Arguments of `BertBackbone` in place of those here.
    """
    import keras_hub

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    shape = {
        "num_layers": 1,
        "num_heads": 2,
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "max_sequence_length": 16,
        "dropout": 0.0,
    }
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=len(vocabulary), **{**shape, **settings}
    )
    rng = np.random.default_rng(11)
    for weight in backbone.trainable_weights:
        if weight.path.rsplit("/", 1)[-1] in ("kernel", "embeddings"):
            weight.assign(rng.normal(size=weight.shape, scale=0.3))
    backbone.save_to_preset(str(folder))
    keras_hub.models.BertTokenizer(vocabulary=vocabulary).save_to_preset(str(folder))
    return folder
