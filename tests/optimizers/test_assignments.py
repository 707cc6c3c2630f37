"""The table of rates: records, printing, and errors."""

import keras
import numpy as np
import pytest
from optimizer_cases import PATHS, SHAPES, fit, make_model, make_variables

from keras_loraplus.optimizers import LoRAPlusAdamW, assignments, loraplus


def test_records():
    optimizer = LoRAPlusAdamW(0.25, lr_ratio=4.0, lr_multipliers={"head/.*": 2.0})
    optimizer.build(make_variables())
    rows = optimizer.assignments()
    assert [row.path for row in rows] == PATHS
    assert [row.shape for row in rows] == list(SHAPES.values())
    assert [row.multiplier for row in rows] == [1.0, 4.0, 1.0, 4.0, 2.0, 2.0]
    assert [row.learning_rate for row in rows] == [0.25, 1.0, 0.25, 1.0, 0.5, 0.5]
    assert [row.pattern for row in rows] == [None] * 4 + ["head/.*"] * 2
    optimizer.learning_rate = 0.5
    assert [row.learning_rate for row in optimizer.assignments()][:2] == [0.5, 2.0]


def test_it_prints_as_an_aligned_table():
    optimizer = LoRAPlusAdamW(0.25, lr_ratio=4.0, lr_multipliers={"head/.*": 2.0})
    optimizer.build(make_variables())
    assert str(optimizer.assignments()) == (
        "variable                   role             shape   multiplier  learning rate\n"
        "-------------------------  ---------------  ------  ----------  -------------\n"
        "block/query/lora_kernel_a  lora_a           (6, 2)           1           0.25\n"
        "block/query/lora_kernel_b  lora_b           (2, 5)           4              1\n"
        "tokens/lora_embeddings_a   embedding_a      (7, 2)           1           0.25\n"
        "tokens/lora_embeddings_b   embedding_b      (2, 4)           4              1\n"
        "head/kernel                other (head/.*)  (4, 3)           2            0.5\n"
        "head/bias                  other (head/.*)  (3,)             2            0.5"
    )


def test_before_build():
    optimizer = LoRAPlusAdamW(0.25)
    with pytest.raises(ValueError, match="optimizer.build"):
        optimizer.assignments()
    assert len(optimizer.assignments(make_variables())) == len(PATHS)
    assert not optimizer.built


@pytest.mark.parametrize("wrapped", [False, True])
def test_of_a_model_before_and_after_fit(wrapped):
    model = make_model()
    optimizer = loraplus(keras.optimizers.SGD)(0.125, lr_ratio=2.0)
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, loss="mse")
    before = assignments(model)
    assert [row.learning_rate for row in before] == [0.125, 0.25, 0.125, 0.125]
    fit(model)
    assert assignments(model) == before


def test_errors_of_a_model():
    with pytest.raises(ValueError, match="compiled model"):
        assignments(make_model())
    model = make_model()
    model.compile(keras.optimizers.AdamW(1e-3), loss="mse")
    with pytest.raises(ValueError, match="Received: AdamW"):
        assignments(model)
    unbuilt = keras.Sequential([keras.layers.Dense(2)])
    unbuilt.compile(LoRAPlusAdamW(1e-3), loss="mse")
    with pytest.raises(ValueError, match="built model"):
        assignments(unbuilt)


def test_a_schedule_is_read_at_the_current_step():
    model = make_model()
    schedule = keras.optimizers.schedules.PolynomialDecay(1.0, 4, end_learning_rate=0.0)
    model.compile(loraplus(keras.optimizers.SGD)(schedule, lr_ratio=2.0), loss="mse")
    assert [row.learning_rate for row in assignments(model)][:2] == [1.0, 2.0]
    fit(model, batch_size=4)
    np.testing.assert_allclose([row.learning_rate for row in assignments(model)][:2], [0.25, 0.5])
