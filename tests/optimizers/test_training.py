"""Inside `fit`: rates, schedules, accumulation, loss scaling, changed models, sparse gradients."""

import keras
import numpy as np
import pytest
from optimizer_cases import (
    fit,
    longhand_adamw,
    make_data,
    make_model,
    to_numpy,
    trainable_values,
)
from tolerances import EXACT, FLOAT32, FUSED_20_STEPS, LONGHAND_ADAM, assert_close

from keras_loraplus.optimizers import LoRAPlusAdamW, assignments, loraplus


def longhand_gradients(values, x, y):
    """Gradients of the mean squared error of `make_model`, by hand."""
    w, a, b, head, bias = values
    hidden = x @ w + x @ a @ b
    error = 2 * (hidden @ head + bias - y) / y.size
    back = error @ head.T
    return [x.T @ (back @ b.T), (x @ a).T @ back, hidden.T @ error, error.sum(axis=0)]


def test_one_fit_equals_longhand_training():
    model = make_model()
    weights = [value.astype("float64") for value in model.get_weights()]
    x, y = (array.astype("float64") for array in make_data())
    multipliers = [1.0, 16.0, 8.0, 8.0]
    optimizer = LoRAPlusAdamW(1e-3, lr_multipliers={".*/head/.*": 8.0}, weight_decay=0.1)
    model.compile(optimizer, loss="mse")
    fit(model, epochs=2)
    names = list(trainable_values(model))
    frozen = next(v for v in model.non_trainable_variables if v.name == "kernel")
    kernel = to_numpy([frozen])[0]
    order = [w for w in weights if w.shape != kernel.shape or np.any(w != kernel)]
    (start_kernel,) = [w for w in weights if w.shape == kernel.shape]
    np.testing.assert_array_equal(kernel, start_kernel)
    steps, current = [], order
    for _ in range(2):
        for start in range(0, len(x), 4):
            batch = slice(start, start + 4)
            steps.append(longhand_gradients([kernel, *current], x[batch], y[batch]))
            current = longhand_adamw(
                order, steps, [1e-3 * multiplier for multiplier in multipliers], 0.1
            )
    for name, value, right in zip(names, trainable_values(model).values(), current, strict=True):
        assert_close(value, right, LONGHAND_ADAM)
        assert name


def test_each_of_the_four_low_rank_variables_gets_its_multiplier():
    inputs = keras.Input((3,), dtype="int32")
    embedding = keras.layers.Embedding(9, 8, name="tokens")
    dense = keras.layers.Dense(8, name="dense")
    model = keras.Model(inputs, dense(embedding(inputs)))
    embedding.enable_lora(2)
    dense.enable_lora(2)
    optimizer = LoRAPlusAdamW(1e-3, lr_ratio=4.0, embedding_lr_multiplier=0.125)
    model.compile(optimizer, loss="mse")
    model.fit(np.ones((4, 3), "int32"), np.ones((4, 3, 8), "float32"), verbose=0)
    by_path = {row.path: (row.role, row.multiplier) for row in optimizer.assignments()}
    assert by_path == {
        "tokens/lora_embeddings_a": ("embedding_a", 0.125),
        "tokens/lora_embeddings_b": ("embedding_b", 0.5),
        "dense/lora_kernel_a": ("lora_a", 1.0),
        "dense/lora_kernel_b": ("lora_b", 4.0),
        "dense/bias": ("other", 1.0),
    }


def test_layers_whose_names_look_like_adapters_are_ordinary():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(3, name="lora_kernel_b_head")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="weighted_avg")(x))
    model.compile(LoRAPlusAdamW(1e-3), loss="mse")
    assert {(row.role, row.multiplier) for row in assignments(model)} == {("other", 1.0)}


def test_a_pattern_with_a_typo_is_an_error_and_changes_nothing():
    model = make_model()
    before = trainable_values(model)
    optimizer = LoRAPlusAdamW(1e-3, lr_multipliers={".*/haed/.*": 8.0})
    model.compile(optimizer, loss="mse")
    count = len(optimizer.variables)
    with pytest.raises(ValueError, match="haed.*head/kernel"):
        fit(model)
    assert not optimizer.built and len(optimizer.variables) == count
    for name, value in trainable_values(model).items():
        np.testing.assert_array_equal(value, before[name])


def sgd_model(learning_rate, **kwargs):
    """Plain gradient descent: how far each side moves tells its rate."""
    model = make_model()
    optimizer = loraplus(keras.optimizers.SGD)(learning_rate, lr_ratio=4.0, **kwargs)
    model.compile(optimizer, loss="mse")
    return model


class Rates(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.rates = []

    def on_epoch_end(self, epoch, logs=None):
        rows = assignments(self.model)
        self.rates.append((rows[0].learning_rate, rows[1].learning_rate))


def check_ratio(rates, expected):
    np.testing.assert_allclose([a for a, _ in rates], expected, rtol=1e-6)
    np.testing.assert_allclose([b for _, b in rates], 4.0 * np.asarray(expected), rtol=1e-6)


def test_learning_rate_scheduler_keeps_the_ratio():
    model, rates = sgd_model(1e-2), Rates()
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, lr: 1e-3)
    fit(model, epochs=2, callbacks=[scheduler, rates])
    check_ratio(rates.rates, [1e-3, 1e-3])
    stock = make_model()
    stock.compile(loraplus(keras.optimizers.SGD)(1e-3, lr_ratio=4.0), loss="mse")
    fit(stock, epochs=2)
    for name, right in trainable_values(stock).items():
        assert_close(trainable_values(model)[name], right, EXACT)


def test_reduce_on_plateau_keeps_the_ratio():
    model, rates = sgd_model(1e-2), Rates()
    reduce = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    fit(model, epochs=4, callbacks=[reduce, rates])
    check_ratio(rates.rates, [1e-2, 5e-3, 2.5e-3, 1.25e-3])


def test_a_warm_up_schedule_keeps_the_ratio():
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=12, warmup_target=1e-2, warmup_steps=6
    )
    model, rates = sgd_model(schedule, weight_decay=0.1), Rates()
    fit(model, epochs=4, callbacks=[rates])
    check_ratio(rates.rates, [float(schedule(step)) for step in (3, 6, 9, 12)])
    both = make_model()
    slow, fast = (
        keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(
                0.0, decay_steps=12, warmup_target=rate, warmup_steps=6
            ),
            weight_decay=0.1,
        )
        for rate in (1e-2, 4e-2)
    )
    both.compile(
        keras.optimizers.MultiOptimizer(lambda v: fast if v.name == "lora_kernel_b" else slow),
        loss="mse",
    )
    fit(both, epochs=4)
    for name, right in trainable_values(both).items():
        assert_close(trainable_values(model)[name], right, FLOAT32)


def test_accumulated_batches_equal_one_large_batch():
    arguments = {"lr_ratio": 8.0, "weight_decay": 0.1, "global_clipnorm": 0.1}
    whole, parts = make_model(), make_model()
    whole.compile(LoRAPlusAdamW(1e-2, **arguments), loss="mse")
    parts.compile(LoRAPlusAdamW(1e-2, gradient_accumulation_steps=3, **arguments), loss="mse")
    start = trainable_values(whole)
    fit(whole, epochs=3, batch_size=12)
    fit(parts, epochs=3, batch_size=4)
    for name, right in trainable_values(whole).items():
        # The mean of three means is rounded otherwise than one mean; Adam's first steps divide
        # each gradient by its own size.
        assert_close(trainable_values(parts)[name], right, 10 * FUSED_20_STEPS)
        assert np.all(np.abs(right - start[name]) > 0)


def apply_scaled(optimizer, gradients, variables):
    """One step; on JAX without side effects, the only way LossScaleOptimizer works there."""
    if keras.backend.backend() != "jax":
        optimizer.apply(gradients, variables)
        return
    values, state = optimizer.stateless_apply(
        [v.value for v in optimizer.variables], gradients, [v.value for v in variables]
    )
    for variable, value in zip([*variables, *optimizer.variables], [*values, *state], strict=True):
        variable.assign(value)


def test_loss_scaling_skips_an_infinite_gradient():
    model = make_model()
    inner = LoRAPlusAdamW(1e-3, lr_ratio=4.0)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    variables = model.trainable_variables
    optimizer.build(variables)
    before = to_numpy(variables)
    finite = [keras.ops.ones(v.shape) for v in variables]
    infinite = [finite[0] * float("inf"), *finite[1:]]
    apply_scaled(optimizer, infinite, variables)
    for value, right in zip(to_numpy(variables), before, strict=True):
        np.testing.assert_array_equal(value, right)
    assert int(inner.iterations) == 0 and float(optimizer.dynamic_scale) == 4.0
    apply_scaled(optimizer, [gradient * 4.0 for gradient in finite], variables)
    plain = LoRAPlusAdamW(1e-3, lr_ratio=4.0)
    twin = make_model()
    plain.apply(finite, twin.trainable_variables)
    for value, right in zip(to_numpy(variables), to_numpy(twin.trainable_variables), strict=True):
        assert_close(value, right, FLOAT32)
    assert [row.multiplier for row in inner.assignments()] == [1.0, 4.0, 1.0, 1.0]


def test_compile_wraps_it_under_mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    model = make_model()
    model.compile(LoRAPlusAdamW(1e-3, lr_ratio=4.0), loss="mse")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    fit(model)
    assert [row.multiplier for row in assignments(model)] == [1.0, 4.0, 1.0, 1.0]


# --- the model has changed since the optimizer was built ---


def intact(model, before):
    values = {variable.path: variable for variable in model.variables}
    for path, right in before.items():
        assert values[path]._value is not None, path
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(values[path]), right, path)


def all_values(model):
    return {v.path: keras.ops.convert_to_numpy(v) for v in model.variables}


@pytest.mark.parametrize("wrapped", [False, True])
def test_other_variables_are_refused_before_any_state_moves(wrapped):
    model = make_model()
    adapted, head = model.layers
    adapted.trainable = False
    optimizer = LoRAPlusAdamW(1e-2)
    outer = keras.optimizers.LossScaleOptimizer(optimizer) if wrapped else optimizer
    model.compile(outer, loss="mse")
    fit(model)
    adapted.trainable, head.trainable = True, False
    before, state = all_values(model), to_numpy(optimizer.variables)
    # What `compile` does again under float16 policies.
    outer = keras.optimizers.LossScaleOptimizer(optimizer) if wrapped else optimizer
    model.compile(outer, loss="mse")
    with pytest.raises(ValueError, match="does not know: .*lora_kernel_a.*new optimizer"):
        fit(model)
    intact(model, before)
    for value, right in zip(to_numpy(optimizer.variables), state, strict=True):
        np.testing.assert_array_equal(value, right)
    model.compile(LoRAPlusAdamW(1e-2), loss="mse")
    fit(model)


def test_fewer_variables(backend):
    model = make_model()
    optimizer = LoRAPlusAdamW(1e-2, lr_ratio=4.0)
    model.compile(optimizer, loss="mse")
    fit(model)
    model.layers[1].trainable = False
    before = all_values(model)
    model.compile(optimizer, loss="mse")
    if backend == "jax":
        # Keras's JAX trainer cannot leave variables out; it would lose the weights while tracing.
        with pytest.raises(ValueError, match="only 2 of them.*new optimizer"):
            fit(model)
        intact(model, before)
    else:
        fit(model)
        moved = {path for path, value in all_values(model).items() if np.any(value != before[path])}
        assert {path.split("/")[-1] for path in moved} == {"lora_kernel_a", "lora_kernel_b"}


def test_building_again_is_harmless():
    model = make_model()
    variables = model.trainable_variables
    optimizer = LoRAPlusAdamW(1e-2)
    optimizer.build(variables)
    count = len(optimizer.variables)
    optimizer.build(variables)
    assert optimizer.built and len(optimizer.variables) == count
    with pytest.raises(ValueError, match="does not know"):
        optimizer.build(make_model().trainable_variables)
    assert optimizer.built


def test_unknown_variables_in_apply_are_refused():
    model, other = make_model(), make_model()
    optimizer = LoRAPlusAdamW(1e-2)
    optimizer.build(model.trainable_variables)
    gradients = [keras.ops.ones(v.shape) for v in other.trainable_variables]
    with pytest.raises(ValueError, match="does not know"):
        optimizer.apply(gradients, other.trainable_variables)
    assert int(optimizer.iterations) == 0


def test_stateless_apply_while_a_variable_is_frozen():
    model = make_model()
    variables = model.trainable_variables
    optimizer = LoRAPlusAdamW(1e-2, lr_ratio=4.0)
    optimizer.build(variables)
    model.layers[1].trainable = False
    assert not optimizer.built
    gradients = [keras.ops.ones(v.shape) for v in variables]
    if keras.backend.backend() == "tensorflow":
        optimizer.apply(gradients)  # TensorFlow has no stateless_apply
        new = variables
    else:
        new, _ = optimizer.stateless_apply(
            [v.value for v in optimizer.variables], gradients, [v.value for v in variables]
        )
    twin = make_model().trainable_variables
    LoRAPlusAdamW(1e-2, lr_ratio=4.0).apply(gradients, twin)
    for value, right in zip(to_numpy(new), to_numpy(twin), strict=True):
        assert_close(value, right, FLOAT32)


# --- gradients of plain embeddings (IndexedSlices on TensorFlow) ---


def embedding_model(dtype="float32"):
    inputs = keras.Input((3,), dtype="int32")
    embedding = keras.layers.Embedding(9, 4, name="tokens", dtype=dtype)
    x = keras.ops.cast(embedding(inputs), "float32")
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    return model


def fit_embedding(model):
    x = np.array([[0, 1, 1], [3, 4, 8], [0, 0, 2]], "int32")
    y = np.random.default_rng(1).normal(size=(3, 3, 2)).astype("float32")
    model.fit(x, y, batch_size=3, epochs=5, shuffle=False, verbose=0)
    return to_numpy(model.trainable_variables)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("clip", [{}, {"global_clipnorm": 0.01}])
def test_a_trainable_embedding(name, clip, backend):
    stock = getattr(keras.optimizers, name)
    expected, model = embedding_model(), embedding_model()
    expected.compile(stock(1e-2, weight_decay=0.01, **clip), loss="mse")
    ours = loraplus(stock)(1e-2, weight_decay=0.01, lr_ratio=1.0, **clip)
    model.compile(ours, loss="mse")
    tolerance = FUSED_20_STEPS if (backend, name) == ("torch", "AdamW") else EXACT
    for value, right in zip(fit_embedding(model), fit_embedding(expected), strict=True):
        assert_close(value, right, tolerance)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_trainable_bfloat16_embedding(name):
    model = embedding_model("bfloat16")
    model.compile(loraplus(getattr(keras.optimizers, name))(0.1), loss="mse")
    before = to_numpy(model.trainable_variables)
    after = fit_embedding(model)
    assert np.any(after[0][:5] != before[0][:5]) and np.isfinite(after[0]).all()


def test_averaged_weights_train_on_in_a_second_fit():
    once, twice = make_model(), make_model()
    for model in (once, twice):
        model.compile(LoRAPlusAdamW(1e-2, use_ema=True, ema_momentum=0.5), loss="mse")
    fit(once)
    fit(twice)
    averaged = list(trainable_values(twice).values())
    for value, average in zip(
        averaged, to_numpy(twice.optimizer._model_variables_moving_average), strict=True
    ):
        assert_close(value, average, EXACT)
    fit(twice)
    for value, start, other in zip(
        trainable_values(twice).values(), averaged, trainable_values(once).values(), strict=True
    ):
        assert_close(other, start, EXACT)
        assert np.isfinite(value).all()
        assert np.abs(value - start).max() > 1e-4
