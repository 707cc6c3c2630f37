"""An overridden `train_step` and custom loops train as `fit` does, whatever the optimizer does."""

import custom_loops
import keras
import numpy as np
import pytest
from lora_cases import all_factors, as_float64, randomize_factors, snapshot
from tiny_models import compile_model, features, fit, functional, normalised, sequences
from tolerances import FLOAT32_MODEL, assert_close

import keras_loraplus as klp

EPOCHS = 2


def adamw(**kwargs):
    return klp.LoRAPlusAdamW(1e-2, lr_ratio=4.0, weight_decay=0.1, **kwargs)


# Six steps in all. The scale doubles on the way; a step of accumulation ends in mid-epoch.
OPTIMIZERS = {
    "plain": lambda: adamw(global_clipnorm=0.05),
    "accumulated": lambda: adamw(gradient_accumulation_steps=2),
    "averaged": lambda: adamw(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(
        adamw(), initial_scale=4.0, dynamic_growth_steps=3
    ),
}
MODELS = {"functional": (functional, features), "normalised": (normalised, sequences)}


def adapted(make):
    model = make()
    klp.enable_lora_plus(model, rank=2, alpha=3)
    randomize_factors(model)
    return model, snapshot(all_factors(model))


def assert_same(model, losses, right, right_losses, start):
    for before, variable in zip(start, all_factors(right), strict=True):
        assert np.abs(as_float64(variable) - before).max() > 1e-3
    for variable, other in zip(model.variables, right.variables, strict=True):
        if "seed" not in variable.path and "loss" not in variable.path:
            assert_close(as_float64(variable), as_float64(other), FLOAT32_MODEL)
    assert_close(losses, right_losses, FLOAT32_MODEL)


@pytest.mark.parametrize(
    "name, optimizer",
    [*(("functional", optimizer) for optimizer in OPTIMIZERS), ("normalised", "plain")],
)
def test_a_loop_equals_fit(name, optimizer):
    make, data = MODELS[name]
    right, start = adapted(make)
    compile_model(right, OPTIMIZERS[optimizer]())
    history = fit(right, data(), epochs=EPOCHS).history["loss"]
    model, _ = adapted(make)
    losses = custom_loops.train(model, data(), OPTIMIZERS[optimizer](), EPOCHS)
    assert_same(model, losses, right, history, start)


@pytest.mark.parametrize("optimizer", ["plain", "loss scale"])
def test_a_train_step_of_ones_own(optimizer):
    def own():
        plain = functional()
        return custom_loops.OwnTrainStep(plain.inputs, plain.outputs)

    right, start = adapted(functional)
    compile_model(right, OPTIMIZERS[optimizer]())
    fit(right, features(), epochs=EPOCHS)
    model, _ = adapted(own)
    compile_model(model, OPTIMIZERS[optimizer]())
    custom_loops.OwnTrainStep.steps = 0
    fit(model, features(), epochs=EPOCHS)
    assert custom_loops.OwnTrainStep.steps > 0
    # A step of one's own logs what it likes; here the loss of the last batch.
    assert_same(model, [], right, [], start)
