"""`keras.callbacks.SwapEMAWeights`: averages are in the model while it is evaluated."""

import keras
import numpy as np
import pytest
from lora_cases import all_factors, randomize_factors, snapshot
from tiny_models import compile_model, features, functional, labels
from tolerances import FLOAT32, FLOAT32_MODEL, FUSED_20_STEPS, assert_close

import keras_loraplus as klp

EPOCHS = 2


def run(optimizer, epochs=EPOCHS, swap=True, on_epoch=True, fits=1):
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model)
    compile_model(model, optimizer)
    callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch=on_epoch)] if swap else []
    for _ in range(fits):
        history = model.fit(
            features(),
            labels(),
            batch_size=4,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
            validation_data=(features(seed=5), labels(seed=6)),
        ).history
    return model, history


def adamw(ratio=8.0, **kwargs):
    return klp.LoRAPlusAdamW(1e-2, lr_ratio=ratio, use_ema=True, ema_momentum=0.5, **kwargs)


@pytest.mark.parametrize("on_epoch", [False, True])
def test_ratio_one_is_stock_adamw(on_epoch):
    stock = keras.optimizers.AdamW(1e-2, use_ema=True, ema_momentum=0.5)
    expected, right = run(stock, on_epoch=on_epoch)
    model, history = run(adamw(1.0), on_epoch=on_epoch)
    for key in ("loss", "val_loss"):
        assert_close(history[key], right[key], FLOAT32_MODEL)
    for value, other in zip(snapshot(model.weights), snapshot(expected.weights), strict=True):
        assert_close(value, other, 10 * FUSED_20_STEPS)


def test_a_second_fit_goes_on():
    once, first = run(adamw())
    twice, second = run(adamw(), fits=2)
    assert second["loss"][0] < first["loss"][0]
    for value, other in zip(snapshot(all_factors(twice)), snapshot(all_factors(once)), strict=True):
        assert np.isfinite(value).all() and np.all(value != other)


def test_validation_sees_the_averages_and_training_does_not():
    _, history = run(adamw())
    _, apart = run(adamw(), swap=False)
    assert_close(history["loss"], apart["loss"], FLOAT32)
    for epochs in range(1, EPOCHS + 1):
        # At its end a fit hands the averages over.
        twin, _ = run(adamw(), epochs=epochs, swap=False)
        right = twin.evaluate(features(seed=5), labels(seed=6), batch_size=4, verbose=0)
        assert_close(history["val_loss"][epochs - 1], right, FLOAT32_MODEL)
    assert np.abs(np.subtract(history["val_loss"], apart["val_loss"])).max() > 1e-3


def test_inside_of_a_loss_scale_optimizer():
    _, right = run(adamw())
    optimizer = keras.optimizers.LossScaleOptimizer(adamw(), initial_scale=4.0)
    model, history = run(optimizer)
    for key in ("loss", "val_loss"):
        assert_close(history[key], right[key], FLOAT32_MODEL)
    assert all(np.isfinite(value).all() for value in snapshot(all_factors(model)))
