"""Configs, `.keras` files, fresh processes, decay exclusions, and what an import does."""

import json

import keras
import numpy as np
import pytest
from optimizer_cases import (
    apply,
    fit,
    gradients,
    make_model,
    make_variables,
    run_python,
    to_numpy,
    trainable_values,
)

from keras_loraplus.optimizers import LoRAPlusAdamW, assignments, factory, loraplus

ARGUMENTS = {
    "learning_rate": 0.0078125,
    "lr_ratio": 4.0,
    "lr_multipliers": {"head/.*": 8.0},
    "embedding_lr_multiplier": 0.5,
    "weight_decay": 0.01,
    "beta_1": 0.8,
    "beta_2": 0.99,
    "epsilon": 1e-6,
    "amsgrad": True,
    "clipnorm": None,
    "clipvalue": None,
    "global_clipnorm": 1.5,
    "use_ema": True,
    "ema_momentum": 0.9,
    "ema_overwrite_frequency": 7,
    "loss_scale_factor": 2.0,
    "gradient_accumulation_steps": 2,
    "name": "mine",
}


def test_every_argument_round_trips_as_plain_json():
    optimizer = LoRAPlusAdamW(**ARGUMENTS)
    config = json.loads(json.dumps(optimizer.get_config()))
    assert config == ARGUMENTS
    assert LoRAPlusAdamW.from_config(config).get_config() == ARGUMENTS
    assert config == ARGUMENTS, "from_config must not change its argument"


def test_a_schedule_round_trips():
    schedule = keras.optimizers.schedules.CosineDecay(0.0, 100, warmup_target=1e-3, warmup_steps=10)
    optimizer = LoRAPlusAdamW(schedule)
    restored = keras.saving.deserialize_keras_object(
        json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
    )
    assert restored.get_config() == optimizer.get_config()
    assert isinstance(restored._learning_rate, keras.optimizers.schedules.CosineDecay)


def test_save_and_load_restores_ratio_patterns_and_moments(tmp_path):
    model = make_model()
    model.compile(LoRAPlusAdamW(1e-2, lr_ratio=4.0, lr_multipliers={".*/head/.*": 8.0}), loss="mse")
    fit(model, epochs=2)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [row.multiplier for row in assignments(loaded)] == [1.0, 4.0, 8.0, 8.0]
    # Keras has renamed the variables: "sequential/head/kernel" is now "head/kernel".
    assert [row.path.rsplit("/", 1)[1] for row in assignments(loaded)] == [
        row.path.rsplit("/", 1)[1] for row in assignments(model)
    ]
    names = [variable.name for variable in model.optimizer.variables]
    assert any("momentum" in name for name in names) and any("velocity" in n for n in names)
    for name, value, right in zip(
        names,
        to_numpy(loaded.optimizer.variables),
        to_numpy(model.optimizer.variables),
        strict=True,
    ):
        np.testing.assert_array_equal(value, right, err_msg=name)
        assert np.any(right), name


RESUME = """
import pathlib
import keras, numpy as np
import keras_loraplus
from optimizer_cases import fit, trainable_values
for path in pathlib.Path(FOLDER).glob("*.keras"):
    model = keras.models.load_model(path)
    fit(model, epochs=2)
    np.savez(path.with_suffix(".npz"), **trainable_values(model))
"""


def test_resuming_in_a_fresh_process_is_bit_for_bit(tmp_path):
    arguments = {"lr_ratio": 4.0, "weight_decay": 0.01, "lr_multipliers": {".*/head/.*": 8.0}}
    straight, halfway = {}, {}
    for name in ("AdamW", "Lion"):
        cls = loraplus(getattr(keras.optimizers, name))
        model = make_model()
        model.compile(cls(1e-2, **arguments), loss="mse")
        fit(model, epochs=4)
        straight[name] = trainable_values(model)
        model = make_model()
        model.compile(cls(1e-2, **arguments), loss="mse")
        fit(model, epochs=2)
        halfway[name] = trainable_values(model)
        model.save(tmp_path / f"{name}.keras")
    run_python(f"FOLDER = {str(tmp_path)!r}\n{RESUME}")
    for name, values in straight.items():
        with np.load(tmp_path / f"{name}.npz") as resumed:
            for key, right in values.items():
                np.testing.assert_array_equal(resumed[key], right, err_msg=f"{name} {key}")
                assert np.any(right != halfway[name][key])


LOAD_ALL = """
import json, pathlib, keras
import keras_loraplus
rows = {}
for path in sorted(pathlib.Path(FOLDER).glob("*.keras")):
    import optimizer_cases
    optimizer = keras.models.load_model(path).optimizer
    rows[path.stem] = [
        type(optimizer).__name__,
        optimizer.lr_ratio,
        [row.multiplier for row in optimizer.assignments()],
        float(sum(abs(v).sum() for v in optimizer_cases.to_numpy(optimizer.variables))),
    ]
print(json.dumps(rows))
"""


def test_a_fresh_process_loads_every_listed_optimizer(tmp_path):
    expected = {}
    for name in factory.LINEAR:
        model = make_model()
        model.compile(loraplus(getattr(keras.optimizers, name))(1e-2, lr_ratio=4.0), loss="mse")
        fit(model)
        model.save(tmp_path / f"{name}.keras")
        total = float(sum(abs(v).sum() for v in to_numpy(model.optimizer.variables)))
        expected[name] = [f"LoRAPlus{name}", 4.0, [1.0, 4.0, 1.0, 1.0], total]
    printed = run_python(f"FOLDER = {str(tmp_path)!r}\n{LOAD_ALL}")
    assert json.loads(printed.splitlines()[-1]) == expected


def decayed(optimizer, variables):
    """Which variables one step with zero gradients moves."""
    before = to_numpy(variables)
    apply(optimizer, variables, [np.zeros_like(array) for array in gradients(0)])
    return [bool(np.any(a != b)) for a, b in zip(before, to_numpy(variables), strict=True)]


def reload(optimizer):
    data = json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
    return keras.saving.deserialize_keras_object(data)


@pytest.mark.parametrize("cls", [LoRAPlusAdamW, loraplus(keras.optimizers.SGD)])
def test_decay_exclusions_survive_a_config_round_trip(cls):
    variables = make_variables()
    optimizer = cls(0.1, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=[variables[0], variables[3]], var_names=["bias"])
    right = [False, True, True, False, True, False]
    assert decayed(reload(optimizer), make_variables()) == right
    assert decayed(reload(reload(optimizer)), make_variables()) == right
    assert decayed(optimizer, variables) == right
    assert decayed(reload(optimizer), make_variables()) == right
    assert decayed(cls(0.1, weight_decay=0.1), make_variables()) == [True] * 6


def test_exclusions_survive_the_renaming_of_a_loaded_model(tmp_path):
    model = make_model()
    optimizer = LoRAPlusAdamW(0.1, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=[model.layers[1].kernel])
    model.compile(optimizer, loss="mse")
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    variables = loaded.trainable_variables
    assert [loaded.optimizer._use_weight_decay(v) for v in variables] == [True, True, False, True]
    model.save(tmp_path / "again.keras")
    loaded = keras.models.load_model(tmp_path / "again.keras")
    variables = loaded.trainable_variables
    assert [loaded.optimizer._use_weight_decay(v) for v in variables] == [True, True, False, True]


def test_a_lost_exclusion_is_an_error():
    variables = make_variables()
    optimizer = LoRAPlusAdamW(0.1, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=[variables[4]])
    restored = reload(optimizer)
    with pytest.raises(ValueError, match="head/kernel"):
        restored.build(variables[:4])
    assert not restored.built
    restored.exclude_from_weight_decay(var_names=["bias"])
    restored.build(variables[:4])


IMPORT = """
import sys, keras
before = set(sys.modules)
import keras_loraplus
for name in ("tensorflow", "jax", "torch"):
    assert (name in sys.modules) == (name in before), name
assert "keras_hub" not in sys.modules and "peft" not in sys.modules
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    assert len(tf.config.list_logical_devices("CPU")) == 2
elif keras.backend.backend() == "jax":
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    assert len(jax.devices("cpu")) == 2
else:
    import torch
    assert not torch.cuda.is_initialized()
"""


def test_an_import_initialises_no_device_and_no_other_backend():
    run_python(IMPORT)
