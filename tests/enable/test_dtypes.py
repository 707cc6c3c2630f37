"""Rule 7 (K05, K06): float32 factors and compute-dtype outputs under every policy."""

import keras
import numpy as np
import pytest
from lora_cases import ONE_OF_EACH, factors, ids, snapshot
from tiny_models import compile_model, filled, labels, tokens

import keras_loraplus as klp

POLICIES = ["bfloat16", "mixed_bfloat16", "mixed_float16"]
COMPUTE = {"bfloat16": "bfloat16", "mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


@pytest.mark.parametrize("policy", [*POLICIES, "float32"])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids(ONE_OF_EACH))
def test_dtypes_of_a_standalone_layer(case, policy):
    options = {"reverse_dtype": None} if "reverse_dtype" in case.arguments else {}
    layer = case.make(dtype=policy, **options)
    compute = COMPUTE.get(policy, policy)
    inputs = keras.ops.convert_to_tensor(case.inputs())
    # Embeddings cast no inputs, and so in reverse none either, as in Keras.
    inputs = keras.ops.cast(inputs, compute) if case.reverse else inputs
    assert dtype_of(case.call(layer, inputs)) == compute
    assert {dtype_of(v) for v in factors(layer)} == {"float32"}
    assert dtype_of(layer.lora_scaling) == "float32"


def classifier(policy):
    """A norm and a bfloat16-capable head stand first in the list of variables."""
    keras.config.set_dtype_policy(policy)
    layers = keras.layers
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(17, 8, name="table")(inputs)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.Conv1D(8, 3, padding="same", name="conv")(x)
    x = layers.EinsumDense("abc,cde->abde", (5, 2, 4), name="einsum")(x)
    x = layers.Reshape((5, 8))(x)
    x = layers.Dense(8, activation="tanh", name="hidden")(x)
    x = layers.GlobalAveragePooling1D()(x)
    model = filled(keras.Model(inputs, layers.Dense(3, name="head")(x)))
    keras.config.set_dtype_policy("float32")
    return model


@pytest.mark.parametrize("init", ["loraplus", "lora"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_factor_moves_on_every_step_from_its_second_on(policy, init):
    model = classifier(policy)
    klp.enable_lora_plus(model, rank=2, init=init, trainable=".*norm.*")
    watched = [v for layer in model.layers if klp.layers.is_adapted(layer) for v in factors(layer)]
    assert len(watched) == 8
    assert dtype_of(model.get_layer("norm").gamma) == (
        "bfloat16" if policy == "bfloat16" else "float32"
    )
    trained = {id(v) for v in model.trainable_variables}
    still = [v for v in model.weights if id(v) not in trained]
    before = snapshot(still)
    compile_model(model, klp.LoRAPlusAdamW(1e-2, lr_ratio=4.0, weight_decay=0.0))
    steps = [snapshot(watched)]
    for start in range(0, 20, 2):
        model.train_on_batch(tokens(20)[start : start + 2], labels(20)[start : start + 2])
        steps.append(snapshot(watched))
    # float16 loss scaling skips steps until its scale has come down.
    applied = [i for i in range(10) if any_moved(steps[i], steps[i + 1])]
    assert len(applied) >= 9 if policy != "mixed_float16" else len(applied) >= 5
    for i in applied[1:]:
        for variable, old, new in zip(watched, steps[i], steps[i + 1], strict=True):
            assert not np.array_equal(old, new), (variable.path, i)
    assert {dtype_of(v) for v in watched} == {"float32"}
    optimizer = model.optimizer
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    moments = [v for v in optimizer.variables if "lora_" in v.path]
    assert len(moments) == 2 * len(watched)
    assert {dtype_of(v) for v in moments} == {"float32"}
    for variable, value in zip(still, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)


def any_moved(old, new):
    return any(not np.array_equal(a, b) for a, b in zip(old, new, strict=True))
