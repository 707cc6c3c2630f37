"""`AdapterCheckpoint`: what is in the file, when it is written, and what is refused."""

import os

import keras
import numpy as np
import pytest
from lora_cases import randomize
from resume_runs import STEPS, Interrupt, Interrupted, fit, made, plain, values
from tiny_models import compile_model

import keras_loraplus as klp
from keras_loraplus import _compat
from keras_loraplus.adapters import files

Checkpoint = klp.callbacks.AdapterCheckpoint


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "folder" / "run.safetensors")


def half(path, name="plain", **kwargs):
    """Trains until the second epoch would begin; returns the model and its inputs."""
    model, inputs = made(name, seed=1)
    with pytest.raises(Interrupted):
        fit(model, inputs, [Checkpoint(path, **kwargs), Interrupt()])
    return model, inputs


def assert_same(model, expected):
    found = values(model)
    assert set(found) == set(expected)
    for key, right in expected.items():
        np.testing.assert_array_equal(found[key], right, err_msg=key)


def test_the_file_holds_what_training_changes_and_no_frozen_weight(path):
    half(path, "plain-dropout")
    content = files.read(path)
    kinds = {}
    for key, value in content.tensors.items():
        kind, _, name = key.partition(":")
        kinds.setdefault(kind, {})[name] = value
    assert sorted(kinds["trained"]) == [
        "layers.1/bias",
        "layers.1/lora_kernel_a",
        "layers.1/lora_kernel_b",
        "layers.2/beta",
        "layers.2/gamma",
        "layers.5/lora_kernel_a",
        "layers.5/lora_kernel_b",
        "layers.6/bias",
        "layers.6/kernel",
    ]
    assert sorted(kinds["state"]) == ["layers.2/moving_mean", "layers.2/moving_variance"]
    assert sorted(kinds["seed"]) == ["layers.1/0", "layers.3/0", "layers.4/0", "layers.5/0"]
    # Step counter and scale, iteration and rate of both, two moments for each that trains.
    assert len(kinds["optimizer"]) == 2 + 2 * 2 + 2 * 9
    assert set(kinds.get("random", {})) == (
        {"cpu"} if keras.backend.backend() == "torch" else set()
    )
    assert set(content.adapters) == {"layers.1", "layers.5"}


def test_done_epochs_are_skipped_once(path):
    model, inputs = made("plain", seed=1)
    callback = Checkpoint(path)
    assert fit(model, inputs, [callback]).epoch == [0, 1]
    assert callback.resumed_from is None
    after_two = values(model)
    assert fit(model, inputs, [callback]).epoch == []
    assert_same(model, after_two)
    assert fit(model, inputs, [callback], epochs=3).epoch == [2]
    assert callback.resumed_from == {"epoch": 2, "batch": 0}
    # A fit without the callback begins where it is told.
    assert fit(model, inputs, epochs=1).epoch == [0]


def test_a_model_that_went_on_is_put_back(path):
    model, inputs = half(path)
    expected = values(model)
    fit(model, inputs, epochs=2)
    twin, _ = made("plain", seed=2)
    for one in (model, twin):
        assert fit(one, inputs, [Checkpoint(path)], epochs=1).epoch == []
        assert_same(one, expected)


@pytest.mark.parametrize(
    "save_freq, positions",
    [
        (2, [(0, 2), (0, 4), (1, 1), (1, 3), (2, 0)]),
        (STEPS, [(1, 0), (2, 0)]),
        ("epoch", [(1, 0), (2, 0)]),
    ],
)
def test_saves_count_batches_across_epochs(path, save_freq, positions, monkeypatch):
    written = []
    monkeypatch.setattr(
        klp.callbacks, "write_checkpoint", lambda model, path, *at: written.append(at)
    )
    model, inputs = made("plain", seed=1)
    fit(model, inputs, [Checkpoint(path, save_freq=save_freq)])
    assert written == positions


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras has no steps_per_execution on torch"
)
def test_steps_per_execution_are_counted(path, monkeypatch):
    written = []
    monkeypatch.setattr(
        klp.callbacks, "write_checkpoint", lambda model, path, *at: written.append(at)
    )
    model, inputs = made("plain", seed=1)
    compile_model(model, klp.LoRAPlusAdamW(1e-2), steps_per_execution=2)
    fit(model, inputs, [Checkpoint(path, save_freq=3)])
    assert written == [(0, 4), (1, 2), (2, 0)]


class Stop(keras.callbacks.Callback):
    """Ends training after the third batch, and notes the state."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            self.seen = values(self.model)
            raise Interrupted


def test_a_save_inside_an_epoch_is_exact_and_the_epoch_starts_again(path):
    model, inputs = made("plain-dropout", seed=1)
    stop = Stop()
    with pytest.raises(Interrupted):
        fit(model, inputs, [Checkpoint(path, save_freq=3), stop])
    twin, _ = made("plain-dropout", seed=2)
    callback = Checkpoint(path)
    assert fit(twin, inputs, [callback], epochs=0).epoch == []
    assert callback.resumed_from == {"epoch": 0, "batch": 3}
    assert_same(twin, stop.seen)
    assert fit(twin, inputs, [Checkpoint(path)], epochs=1).epoch == [0]


def test_the_file_can_be_deleted_at_the_end(path):
    model, inputs = made("plain", seed=1)
    fit(model, inputs, [Checkpoint(path, delete_checkpoint=True)])
    assert os.listdir(os.path.dirname(path)) == []
    half(path, delete_checkpoint=True)
    assert os.listdir(os.path.dirname(path)) == ["run.safetensors"]


def test_a_keras_optimizer_and_low_precision_come_back(path):
    def make():
        keras.config.set_dtype_policy("bfloat16")
        model, inputs = plain()
        compile_model(model, keras.optimizers.Adam(1e-2))
        return model, inputs

    model, inputs = make()
    fit(model, inputs, [Checkpoint(path)], epochs=1)
    twin, _ = make()
    randomize(list(twin.trainable_variables), seed=5)
    fit(twin, inputs, [Checkpoint(path)], epochs=1)
    assert_same(twin, values(model))
    assert twin.layers[-1].kernel.dtype == "bfloat16"


def other(enable=None, optimizer=None):
    """The plain model, enabled or compiled differently."""
    model, inputs = plain()
    if enable is not None:
        klp.merge_lora_plus(model)
        settings = {"rank": 2, "alpha": 5, "trainable": ".*first/bias"}
        klp.enable_lora_plus(model, **{**settings, **enable})
    compile_model(model, optimizer or klp.LoRAPlusAdamW(1e-2))
    return model, inputs


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"enable": {"rank": 3}}, "adapter of layers.1: .*'rank': 2.* in the file"),
        ({"enable": {"alpha": 4}}, "adapter of layers.1: .*'alpha': 4.* here"),
        ({"enable": {"dropout": 0.5}}, "adapter of layers.1: .*'dropout': 0.5.* here"),
        ({"enable": {"targets": ["first"], "trainable": ".*head.*"}}, "layers.2: .* None here"),
        ({"enable": {"trainable": ()}}, "unexpected: trained:layers.1/bias"),
        ({"optimizer": keras.optimizers.SGD}, "optimizer: LoRAPlusAdamW in the file, SGD here"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(path, changes, fault):
    half(path)
    if "optimizer" in changes:
        changes = {"optimizer": changes["optimizer"](0.1)}
    model, inputs = other(**changes)
    model.optimizer.build(model.trainable_variables)
    before = values(model)
    with pytest.raises(ValueError, match=fault) as error:
        fit(model, inputs, [Checkpoint(path)])
    assert "nothing was loaded" in str(error.value)
    assert_same(model, before)


def test_a_damaged_file_is_refused_and_nothing_changes(path):
    half(path)
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        file.seek(size - 3)
        byte = file.read(1)[0]
        file.seek(size - 3)
        file.write(bytes([byte ^ 1]))
    model, inputs = made("plain", seed=2)
    model.optimizer.build(model.trainable_variables)
    before = values(model)
    with pytest.raises(ValueError, match="damaged"):
        fit(model, inputs, [Checkpoint(path)])
    assert_same(model, before)


def test_an_adapter_file_is_no_checkpoint(tmp_path):
    model, inputs = made("plain", seed=1)
    path = klp.save_adapter(model, str(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match="without a state of training"):
        fit(model, inputs, [Checkpoint(path)])


def test_a_model_without_adapters_is_told(path):
    model, inputs = plain()
    klp.merge_lora_plus(model)
    compile_model(model)
    with pytest.raises(ValueError, match="BackupAndRestore"):
        fit(model, inputs, [Checkpoint(path)])


def test_another_base_is_told(path):
    half(path)
    model, inputs = made("plain", seed=2)
    model.layers[1].kernel.assign(model.layers[1].kernel + 1)
    with pytest.warns(UserWarning, match="other frozen weights"):
        fit(model, inputs, [Checkpoint(path)])


@pytest.mark.parametrize(
    "arguments, fault",
    [
        ({"filepath": ""}, "`filepath` must be"),
        ({"filepath": 3}, "`filepath` must be"),
        ({"filepath": "a", "save_freq": 0}, "`save_freq` must be .* Received: 0"),
        ({"filepath": "a", "save_freq": True}, "`save_freq` must be .* Received: True"),
        ({"filepath": "a", "save_freq": "batch"}, "`save_freq` must be .* Received: 'batch'"),
    ],
)
def test_arguments_are_checked(arguments, fault):
    with pytest.raises(ValueError, match=fault):
        Checkpoint(**arguments)


def test_a_folder_is_refused_before_training(tmp_path):
    model, inputs = made("plain", seed=1)
    with pytest.raises(ValueError, match="is a folder"):
        fit(model, inputs, [Checkpoint(tmp_path)])


def as_second_process(monkeypatch):
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        monkeypatch.setattr(jax, "process_index", lambda: 1)
    elif backend == "torch":
        import torch

        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    else:
        import tensorflow as tf

        extended = type(tf.distribute.get_strategy().extended)
        monkeypatch.setattr(extended, "should_checkpoint", property(lambda self: False))


def test_only_the_first_process_writes_and_all_read(path, monkeypatch):
    model, _ = half(path)
    with open(path, "rb") as file:
        written = file.read()
    second, inputs = made("plain", seed=2)
    assert _compat.is_first_process(model)
    with monkeypatch.context() as patch:
        as_second_process(patch)
        assert not _compat.is_first_process(model)
    with monkeypatch.context() as patch:
        patch.setattr(_compat, "is_first_process", lambda model: False)
        callback = Checkpoint(path, delete_checkpoint=True)
        fit(second, inputs, [callback])
    assert callback.resumed_from == {"epoch": 1, "batch": 0}
    with open(path, "rb") as file:
        assert file.read() == written
