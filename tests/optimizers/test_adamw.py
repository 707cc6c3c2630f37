"""LoRAPlusAdamW against longhand numpy, two stock optimizers, and stock AdamW at ratio 1."""

import keras
import numpy as np
import pytest
from optimizer_cases import (
    PATHS,
    RATIOS,
    apply,
    gradients,
    longhand_adamw,
    make_variables,
    start_values,
    to_numpy,
    train,
)
from tolerances import EXACT, FUSED_20_STEPS, LONGHAND_ADAM, assert_close, relative_error

from keras_loraplus.optimizers import LoRAPlusAdamW, loraplus


@pytest.fixture
def stock_tolerance(backend):
    """Rule 3: identical where the stock step runs, close where torch's fused kernel does."""
    return FUSED_20_STEPS if backend == "torch" else EXACT


def test_equals_longhand_loraplus_adamw():
    expected = longhand_adamw(
        start_values().values(),
        [gradients(step) for step in range(10)],
        [1e-3 * RATIOS[path] for path in PATHS],
        weight_decay=0.1,
    )
    optimizer = LoRAPlusAdamW(1e-3, lr_ratio=16.0, weight_decay=0.1)
    actual = train(optimizer, make_variables(), steps=10)
    for path, value, right in zip(PATHS, actual, expected, strict=True):
        assert_close(value, right, LONGHAND_ADAM)
        # A wrong ratio or decay would be seen: the weights moved by far more than that.
        assert relative_error(value, start_values()[path]) > 100 * LONGHAND_ADAM


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e3])
def test_epsilon_is_where_keras_has_it(scale):
    # Gradients of 1e-6 bring sqrt(v) down to epsilon in the first steps.
    arrays = [gradients(step, scale) for step in range(10)]
    expected = longhand_adamw(
        start_values().values(), arrays, [1e-3 * RATIOS[path] for path in PATHS], 0.0
    )
    optimizer = LoRAPlusAdamW(1e-3, lr_ratio=16.0, weight_decay=0.0)
    actual = train(optimizer, make_variables(), steps=10, scale=scale)
    for value, right in zip(actual, expected, strict=True):
        assert_close(value, right, LONGHAND_ADAM)


def test_equals_two_stock_optimizers(stock_tolerance):
    slow = keras.optimizers.AdamW(1e-3, weight_decay=0.05, clipnorm=0.5)
    fast = keras.optimizers.AdamW(16e-3, weight_decay=0.05, clipnorm=0.5)
    both = keras.optimizers.MultiOptimizer(
        lambda variable: fast if RATIOS[variable.path] == 16.0 else slow
    )
    expected = train(both, make_variables())
    optimizer = LoRAPlusAdamW(1e-3, lr_ratio=16.0, weight_decay=0.05, clipnorm=0.5)
    for value, right in zip(train(optimizer, make_variables()), expected, strict=True):
        # 16 is a power of two, so both rates are rounded alike.
        assert_close(value, right, stock_tolerance)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"weight_decay": 0.1},
        {"clipnorm": 0.3},
        {"clipvalue": 0.1},
        {"global_clipnorm": 0.5},
        {"gradient_accumulation_steps": 3},
        {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 4},
        {"amsgrad": True},
        {"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-3, "loss_scale_factor": 4.0},
        {
            "weight_decay": 0.1,
            "global_clipnorm": 0.5,
            "gradient_accumulation_steps": 2,
            "use_ema": True,
        },
    ],
    ids=lambda arguments: "-".join(arguments) or "defaults",
)
def test_ratio_one_is_stock_adamw(arguments, stock_tolerance):
    stock = keras.optimizers.AdamW(1e-2, **arguments)
    optimizer = LoRAPlusAdamW(1e-2, lr_ratio=1.0, **arguments)
    expected_variables, variables = make_variables(), make_variables()
    expected = train(stock, expected_variables)
    actual = train(optimizer, variables)
    for path, value, right in zip(PATHS, actual, expected, strict=True):
        assert_close(value, right, stock_tolerance)
        assert relative_error(right, start_values()[path]) > 1e-3
    stock.finalize_variable_values(expected_variables)
    optimizer.finalize_variable_values(variables)
    for value, right in zip(to_numpy(variables), to_numpy(expected_variables), strict=True):
        assert_close(value, right, stock_tolerance)


def test_decay_is_at_each_variables_own_rate():
    variables = make_variables()
    optimizer = LoRAPlusAdamW(0.01, lr_ratio=8.0, weight_decay=0.1)
    frozen = keras.Variable(np.ones((3,), "float32"), trainable=False, name="kernel")
    apply(optimizer, variables, [np.zeros(v.shape, "float32") for v in variables])
    for path, value in zip(PATHS, to_numpy(variables), strict=True):
        ratio = 8.0 if path.endswith("_b") else 1.0
        right = start_values()[path].astype("float64") * (1 - ratio * 0.01 * 0.1)
        assert_close(value, right, LONGHAND_ADAM)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(frozen), 1.0)


def test_sgd_moves_b_ratio_times_as_far():
    ones = [np.ones_like(value) for value in start_values().values()]
    variables = make_variables()
    optimizer = loraplus(keras.optimizers.SGD)(0.5, lr_ratio=4.0)
    for _ in range(3):
        apply(optimizer, variables, ones)
    for path, value in zip(PATHS, to_numpy(variables), strict=True):
        ratio = 4.0 if path.endswith("_b") else 1.0
        assert_close(value, start_values()[path] - 3 * 0.5 * ratio, LONGHAND_ADAM)


def test_global_clipnorm_is_one_norm_over_everything():
    limit = 0.5
    arrays = gradients(0, scale=10.0)
    norm = np.sqrt(sum(np.sum(a.astype("float64") ** 2) for a in arrays))
    variables = make_variables()
    optimizer = loraplus(keras.optimizers.SGD)(1.0, lr_ratio=4.0, global_clipnorm=limit)
    apply(optimizer, variables, arrays)
    for path, array, value in zip(PATHS, arrays, to_numpy(variables), strict=True):
        ratio = 4.0 if path.endswith("_b") else 1.0
        assert_close(value, start_values()[path] - ratio * array * limit / norm, LONGHAND_ADAM)


def test_moving_average_equals_longhand():
    momentum, every = 0.75, 4
    weights = [value.astype("float64") for value in start_values().values()]
    averages = [np.zeros_like(w) for w in weights]
    rates = [0.1 * (4.0 if path.endswith("_b") else 1.0) for path in PATHS]
    for step in range(10):
        arrays = gradients(step)
        weights = [w - rate * g for w, rate, g in zip(weights, rates, arrays, strict=True)]
        kept = momentum if step else 0.0
        averages = [kept * a + (1 - kept) * w for a, w in zip(averages, weights, strict=True)]
        if (step + 1) % every == 0:
            weights = [a.copy() for a in averages]
    variables = make_variables()
    optimizer = loraplus(keras.optimizers.SGD)(
        0.1, lr_ratio=4.0, use_ema=True, ema_momentum=momentum, ema_overwrite_frequency=every
    )
    for value, right in zip(train(optimizer, variables, steps=10), weights, strict=True):
        assert_close(value, right, LONGHAND_ADAM)
    optimizer.finalize_variable_values(variables)
    for value, right in zip(to_numpy(variables), averages, strict=True):
        assert_close(value, right, LONGHAND_ADAM)


def test_multipliers_are_plain_numbers_by_index():
    optimizer = LoRAPlusAdamW(1e-3, lr_ratio=2.0, lr_multipliers={"head/.*": 3.0})
    optimizer.build(make_variables())
    multipliers = optimizer._loraplus.multipliers
    assert type(multipliers) is list
    assert multipliers == [1.0, 2.0, 1.0, 2.0, 3.0, 3.0]


def test_arguments_are_read_only():
    optimizer = LoRAPlusAdamW(1e-3)
    assert (optimizer.lr_ratio, optimizer.embedding_lr_multiplier) == (16.0, 1.0)
    optimizer.lr_multipliers["head/.*"] = 2.0
    assert optimizer.lr_multipliers == {}
    with pytest.raises(AttributeError):
        optimizer.lr_ratio = 8.0


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), True, "16"])
@pytest.mark.parametrize("optimizer", [keras.optimizers.AdamW, keras.optimizers.SGD])
def test_a_bad_ratio_is_refused(optimizer, bad):
    with pytest.raises(ValueError, match="`lr_ratio` must be a positive, finite number"):
        loraplus(optimizer)(1e-3, lr_ratio=bad)


def test_a_stock_argument_in_second_place_is_not_taken_for_the_ratio():
    with pytest.raises(TypeError):
        LoRAPlusAdamW(1e-3, 0.01)
