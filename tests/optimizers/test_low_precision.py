"""bfloat16 and float16 variables: float32 moments and scalars, whatever comes first."""

import keras
import numpy as np
import pytest
from optimizer_cases import PATHS, apply, gradients, make_variables, start_values, to_numpy, train
from tolerances import BFLOAT16, EXACT, FLOAT16, FLOAT32, assert_close

from keras_loraplus.optimizers import LoRAPlusAdamW, factory, loraplus

# The variable that comes first, which is where Keras takes the dtype of its scalars from, is one.
LOW = {"block/query/lora_kernel_a": "bfloat16", "head/bias": "bfloat16"}


def rounded(dtype):
    """Start values that the low-precision dtype represents exactly."""
    return {
        path: keras.ops.convert_to_numpy(
            keras.ops.cast(keras.ops.cast(value, dtype if path in LOW else "float32"), "float32")
        )
        for path, value in start_values().items()
    }


@pytest.mark.parametrize("name", sorted(factory.LINEAR))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_step_is_the_float32_step_rounded(name, dtype):
    tolerance = BFLOAT16 if dtype == "bfloat16" else FLOAT16
    cls = loraplus(getattr(keras.optimizers, name))
    arguments = {"lr_ratio": 4.0, "weight_decay": 0.1}
    wide = make_variables(values=rounded(dtype))
    low = make_variables(dict.fromkeys(LOW, dtype), values=rounded(dtype))
    # The gradient of a low-precision variable arrives in that precision.
    arrays = [
        keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.cast(g, v.dtype), "float32"))
        for g, v in zip(gradients(0), low, strict=True)
    ]
    apply(cls(1e-2, **arguments), wide, arrays)
    apply(cls(1e-2, **arguments), low, arrays)
    for path, value, right in zip(PATHS, to_numpy(low), to_numpy(wide), strict=True):
        assert_close(value, right, tolerance if path in LOW else EXACT)


@pytest.mark.parametrize("name", sorted(factory.LINEAR))
def test_optimizer_state_is_float32(name):
    optimizer = loraplus(getattr(keras.optimizers, name))(
        1e-2, use_ema=True, gradient_accumulation_steps=2
    )
    optimizer.build(make_variables(LOW))
    for variable in optimizer.variables:
        assert variable.dtype in ("float32", "int32", "int64"), (variable.path, variable.dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_everything_moves_on_every_step(dtype):
    variables = make_variables(dict.fromkeys(LOW, dtype))
    optimizer = LoRAPlusAdamW(1e-2, weight_decay=0.0, global_clipnorm=10.0)
    for step in range(10):
        before = to_numpy(variables)
        apply(optimizer, variables, gradients(step))
        for path, old, new in zip(PATHS, before, to_numpy(variables), strict=True):
            # A step of 0.01 is below half a unit in the last place of the largest entries.
            assert np.mean(old != new) > (0.3 if path in LOW else 0.9), (path, step)


def test_a_low_precision_neighbour_changes_no_number():
    float32_only = train(LoRAPlusAdamW(1e-2, lr_ratio=4.0), make_variables())
    mixed = train(LoRAPlusAdamW(1e-2, lr_ratio=4.0), make_variables(LOW))
    for path, value, right in zip(PATHS, mixed, float32_only, strict=True):
        if path not in LOW:
            np.testing.assert_array_equal(value, right)


def test_the_global_norm_is_float32():
    # The square of 300 is beyond float16.
    arrays = [np.full(value.shape, 300.0, "float32") for value in start_values().values()]
    norm = np.sqrt(sum(np.sum(array.astype("float64") ** 2) for array in arrays))
    variables = make_variables(dict.fromkeys(LOW, "float16"), values=rounded("float16"))
    optimizer = loraplus(keras.optimizers.SGD)(1.0, lr_ratio=1.0, global_clipnorm=1.0)
    apply(optimizer, variables, arrays)
    for array, value, start in zip(
        arrays, to_numpy(variables), rounded("float16").values(), strict=True
    ):
        assert_close(value, start - array / norm, FLOAT16)


def test_accumulation_and_averages_in_low_precision():
    arguments = {"lr_ratio": 4.0, "gradient_accumulation_steps": 2, "use_ema": True}
    arguments |= {"ema_momentum": 0.5, "ema_overwrite_frequency": 3}
    wide = make_variables(values=rounded("bfloat16"))
    expected = train(LoRAPlusAdamW(1e-2, **arguments), wide, steps=8)
    variables = make_variables(LOW, values=rounded("bfloat16"))
    optimizer = LoRAPlusAdamW(1e-2, **arguments)
    actual = train(optimizer, variables, steps=8)
    for path, value, right in zip(PATHS, actual, expected, strict=True):
        # Four roundings of the weight, one a step.
        assert_close(value, right, 4 * BFLOAT16 if path in LOW else FLOAT32)
    optimizer.finalize_variable_values(variables)
    assert all(np.isfinite(value).all() for value in to_numpy(variables))


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16", "mixed_float16"])
def test_fit_with_a_low_precision_head_listed_first(policy):
    keras.config.set_dtype_policy(policy)
    inputs = keras.Input((6,))
    head = keras.layers.Dense(4, name="first")
    b = keras.layers.Dense(2, use_bias=False, name="second", dtype="float32")
    model = keras.Model(inputs, b(head(inputs)))
    b.kernel._name = "lora_kernel_b"
    b.kernel._path = "second/lora_kernel_b"
    optimizer = LoRAPlusAdamW(1e-3, weight_decay=0.0)
    model.compile(optimizer, loss="mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 6)).astype("float32"), rng.normal(size=(8, 2)).astype("float32")
    applied = 0
    for _ in range(8):
        before, count = to_numpy(model.trainable_variables), int(optimizer.iterations)
        model.fit(x, y, batch_size=8, verbose=0)
        after = to_numpy(model.trainable_variables)
        # Loss scaling skips steps until its scale fits.
        if int(optimizer.iterations) > count:
            applied += 1
            assert all(np.any(old != new) for old, new in zip(before, after, strict=True))
    assert applied >= 4
    assert [row.multiplier for row in optimizer.assignments()] == [1.0, 1.0, 16.0]
