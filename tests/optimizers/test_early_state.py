"""State that is loaded before an optimizer is built is there once it is (issue: resume)."""

import keras
import numpy as np
import pytest
from optimizer_cases import fit, make_data, make_model, to_numpy, trainable_values

import keras_loraplus as klp

SCHEDULE = keras.optimizers.schedules.ExponentialDecay(1e-2, 3, 0.5)


def adamw(rate=1e-2, **kwargs):
    return klp.LoRAPlusAdamW(rate, lr_ratio=4.0, **kwargs)


def scaled():
    return keras.optimizers.LossScaleOptimizer(adamw(), initial_scale=8.0, dynamic_growth_steps=4)


OPTIMIZERS = {
    "adamw": adamw,
    "schedule": lambda: adamw(SCHEDULE),
    "amsgrad, accumulation": lambda: adamw(amsgrad=True, gradient_accumulation_steps=2),
    "nadam": lambda: klp.loraplus(keras.optimizers.Nadam)(1e-2),
    "loss scale": scaled,
}


def compiled(optimizer, seed=7):
    model = make_model(seed)
    model.compile(optimizer, loss="mse")
    return model


@pytest.fixture
def trained(request, tmp_path):
    model = compiled(OPTIMIZERS[request.param]())
    fit(model, epochs=2)
    model.save_weights(tmp_path / "a.weights.h5")
    return model, tmp_path / "a.weights.h5", OPTIMIZERS[request.param]


def assert_same_state(optimizer, expected):
    for variable, ours, right in zip(
        optimizer.variables, to_numpy(optimizer.variables), expected, strict=True
    ):
        np.testing.assert_array_equal(ours, right, err_msg=variable.name)


@pytest.mark.parametrize("trained", OPTIMIZERS, indirect=True)
def test_weights_loaded_before_the_first_step(trained):
    model, path, make = trained
    state = to_numpy(model.optimizer.variables)
    assert sum(np.any(array) for array in state) > 8, "moments are there to be lost"
    twin = compiled(make(), seed=8)
    twin.load_weights(path)
    assert not twin.optimizer.built
    assert int(twin.optimizer.iterations) == int(model.optimizer.iterations) > 0
    fit(model)
    fit(twin)
    assert_same_state(twin.optimizer, to_numpy(model.optimizer.variables))
    for name, value in trainable_values(twin).items():
        np.testing.assert_array_equal(value, trainable_values(model)[name], err_msg=name)


@pytest.mark.parametrize("trained", OPTIMIZERS, indirect=True)
def test_build_applies_the_state_exactly(trained):
    model, path, make = trained
    twin = compiled(make(), seed=8)
    twin.load_weights(path)
    twin.optimizer.build(twin.trainable_variables)
    assert_same_state(twin.optimizer, to_numpy(model.optimizer.variables))


@pytest.mark.parametrize("trained", ["adamw"], indirect=True)
def test_saving_before_the_first_step_keeps_the_state(trained, tmp_path):
    model, path, make = trained
    twin = compiled(make(), seed=8)
    twin.load_weights(path)
    twin.save_weights(tmp_path / "b.weights.h5")
    third = compiled(make(), seed=9)
    third.load_weights(tmp_path / "b.weights.h5")
    third.optimizer.build(third.trainable_variables)
    assert_same_state(third.optimizer, to_numpy(model.optimizer.variables))


@pytest.mark.parametrize("trained", ["adamw"], indirect=True)
def test_a_rate_set_after_loading_stays(trained):
    _, path, make = trained
    twin = compiled(make(), seed=8)
    twin.load_weights(path)
    twin.optimizer.learning_rate = 0.125
    twin.optimizer.build(twin.trainable_variables)
    assert float(twin.optimizer.learning_rate) == 0.125


def spoiled(optimizer, change):
    store = {str(i): value for i, value in enumerate(to_numpy(optimizer.variables))}
    change(store)
    return store


def drop_last(store):
    del store[str(len(store) - 1)]


def other_shape(store):
    store["2"] = np.ones((7, 7), "float32")


@pytest.mark.parametrize("trained", ["adamw"], indirect=True)
@pytest.mark.parametrize(
    "change, message",
    [
        (drop_last, "holds 9 arrays where the optimizer has 10 variables"),
        (other_shape, r"shape \(7, 7\) for '.*', whose shape is \(6, 2\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_each_time(trained, change, message):
    model, _, make = trained
    twin = compiled(make(), seed=8)
    before = trainable_values(twin)
    twin.optimizer.load_own_variables(spoiled(model.optimizer, change))
    with pytest.raises(ValueError, match=message):
        fit(twin)
    for _ in range(2):  # no later attempt may train from moments of zero
        with pytest.raises(ValueError, match=message):
            twin.optimizer.apply(
                [keras.ops.zeros(v.shape) for v in twin.trainable_variables],
                twin.trainable_variables,
            )
    for name, value in trainable_values(twin).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    twin.compile(make(), loss="mse")
    fit(twin)


@pytest.mark.parametrize("trained", ["adamw"], indirect=True)
def test_a_built_optimizer_is_not_half_loaded(trained):
    model, _, _ = trained
    before = to_numpy(model.optimizer.variables)
    store = spoiled(model.optimizer, other_shape)
    store["0"] = np.asarray(99)
    with pytest.raises(ValueError, match=r"shape \(7, 7\)"):
        model.optimizer.load_own_variables(store)
    assert_same_state(model.optimizer, before)


def test_a_file_without_optimizer_state_changes_none(tmp_path):
    make_model().save_weights(tmp_path / "base.weights.h5")
    for make in (adamw, scaled):
        twin = compiled(make(), seed=8)
        twin.load_weights(tmp_path / "base.weights.h5")
        fit(twin)
        assert int(twin.optimizer.iterations) == 3


def test_a_state_from_before_training_is_loaded(tmp_path):
    for make in (adamw, scaled):
        model = compiled(make())
        model.optimizer.learning_rate = 0.5
        model.save_weights(tmp_path / "a.weights.h5")
        twin = compiled(make(), seed=8)
        twin.load_weights(tmp_path / "a.weights.h5")
        fit(twin)
        assert float(twin.optimizer.learning_rate) == 0.5


def test_keras_optimizers_in_a_loss_scale_optimizer_are_as_before(tmp_path):
    stock = keras.optimizers.LossScaleOptimizer
    model = compiled(stock(keras.optimizers.AdamW(1e-2)))
    fit(model)
    model.save_weights(tmp_path / "a.weights.h5")
    twin = compiled(stock(keras.optimizers.AdamW(1e-2)), seed=8)
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        twin.load_weights(tmp_path / "a.weights.h5")
    twin = compiled(stock(keras.optimizers.AdamW(1e-2)), seed=8)
    twin.optimizer.build(twin.trainable_variables)
    twin.load_weights(tmp_path / "a.weights.h5")
    assert_same_state(twin.optimizer, to_numpy(model.optimizer.variables))


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only TensorFlow builds inside of a trace"
)
@pytest.mark.parametrize("trained", ["adamw"], indirect=True)
def test_a_build_inside_of_a_trace(trained):
    import tensorflow as tf

    model, path, make = trained
    twins = []
    for wrap in (tf.function, lambda function: function):
        twin = compiled(make(), seed=8)
        twin.load_weights(path)

        def step(x, y, twin=twin):
            with tf.GradientTape() as tape:
                loss = keras.ops.mean(keras.ops.square(twin(x) - y))
            variables = twin.trainable_variables
            values = [v.value for v in variables]
            twin.optimizer.apply(tape.gradient(loss, values), variables)

        run = wrap(step)
        for _ in range(3):
            run(*map(tf.constant, make_data()))
        twins.append(to_numpy(twin.optimizer.variables))
    for traced, eager in zip(*twins, strict=True):
        np.testing.assert_allclose(traced, eager, rtol=1e-4, atol=1e-6)
