"""The same code with `keras_nlp` in place of `keras_hub`."""

import keras
import keras_nlp
import numpy as np
import pytest
from tolerances import COMPILED_FLOAT32, FLOAT32_MODEL, assert_close, relative_error

import keras_loraplus as klp


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    return {
        "token_ids": rng.integers(1, 40, size=(16, 8)).astype("int32"),
        "segment_ids": np.zeros((16, 8), "int32"),
        "padding_mask": np.ones((16, 8), "bool"),
    }


def test_enables_trains_and_merges(inputs):
    backbone = keras_nlp.models.BertBackbone(
        vocabulary_size=40,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=8,
        dropout=0.0,
    )
    model = keras_nlp.models.BertTextClassifier(backbone, num_classes=3, preprocessor=None)
    start = model.predict(inputs, verbose=0)
    adapted = klp.enable_lora_plus(backbone, rank=2)
    assert [layer.path.rsplit("/", 1)[-1] for layer in adapted.adapted].count("query") == 2
    assert_close(model.predict(inputs, verbose=0), start, COMPILED_FLOAT32)
    model.compile(
        klp.LoRAPlusAdamW(1e-2, lr_ratio=16.0, lr_multipliers={"logits/.*": 2.0}),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(inputs, np.arange(16) % 3, batch_size=8, epochs=3, shuffle=False, verbose=0)
    trained = model.predict(inputs, verbose=0)
    assert relative_error(trained, start) > 0.05
    klp.merge_lora_plus(backbone)
    assert not any("lora" in weight.path for weight in model.weights)
    assert_close(model.predict(inputs, verbose=0), trained, FLOAT32_MODEL)
