"""Structural keys reach every layer, and tell every two apart."""

import keras
import numpy as np
import pytest
from keras import layers
from lora_cases import all_factors, randomize
from tolerances import EXACT, assert_close

import keras_loraplus as klp
from keras_loraplus.structure import layers_by_path


class Nested(keras.Model):
    """Layers in lists, tuples and dicts inside one another."""

    def __init__(self):
        super().__init__()
        make = lambda: layers.Dense(4, activation="tanh")  # noqa: E731
        self.a = [[make(), make()], [make()]]
        self.b = {"x": [make()], "y": {"z": make()}, 3: make()}
        self.c = (make(), (make(),))

    def call(self, x):
        inner = [*self.a[0], *self.a[1], self.b["x"][0], self.b["y"]["z"], self.b[3]]
        for layer in [*inner, self.c[0], self.c[1][0]]:
            x = layer(x)
        return x


def nested(seed=0):
    keras.utils.set_random_seed(seed)
    model = Nested()
    model(np.ones((1, 4), "float32"))
    return model


def test_layers_in_nested_containers_are_reached():
    names = ["a.0.0", "a.0.1", "a.1.0", "b.x.0", "b.y.z", "b.3", "c.0", "c.1.0"]
    assert sorted(layers_by_path(nested())) == sorted(["", *names])


def test_adapters_in_nested_containers_come_back(tmp_path):
    model = nested()
    klp.enable_lora_plus(model, rank=2, targets="all-linear")
    assert len(all_factors(model)) >= 14
    randomize(model.trainable_variables)
    path = klp.save_adapter(model, tmp_path / "a.safetensors")
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    twin = nested()
    before = keras.ops.convert_to_numpy(twin(x))
    klp.load_adapter(twin, path)
    expected = keras.ops.convert_to_numpy(model(x))
    assert_close(keras.ops.convert_to_numpy(twin(x)), expected, EXACT)
    assert np.abs(before - expected).max() > 0.01


class Ambiguous(keras.Model):
    def __init__(self):
        super().__init__()
        self.d = {"a": {"b": layers.Dense(4)}, "a.b": layers.Dense(4)}

    def call(self, x):
        return self.d["a.b"](self.d["a"]["b"](x))


class TwiceNamed(layers.Layer):
    def build(self, shape):
        self.one = self.add_weight(shape=(4,), name="w")
        self.two = self.add_weight(shape=(4,), name="w")

    def call(self, x):
        return x * self.one + self.two


def test_what_a_file_could_not_tell_apart_is_refused_at_save(tmp_path):
    path = tmp_path / "a.safetensors"
    ambiguous = Ambiguous()
    ambiguous(np.ones((1, 4), "float32"))
    klp.enable_lora_plus(ambiguous, rank=2, targets="all-linear")
    with pytest.raises(ValueError, match=r"Two layers stand at 'd.a.b'"):
        klp.save_adapter(ambiguous, path)
    twice = keras.Sequential([keras.Input((4,)), layers.Dense(4), TwiceNamed(), layers.Dense(2)])
    klp.enable_lora_plus(twice, rank=2, trainable=".*w")
    with pytest.raises(ValueError, match="two variables named 'w'"):
        klp.save_adapter(twice, path)
    assert not path.exists()


class Hidden(keras.Model):
    """Holds a layer in a set, which has no order."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(4)
        self.rest = {layers.Dense(4)}

    def call(self, x):
        return next(iter(self.rest))(self.first(x))


def test_a_variable_that_no_path_leads_to_is_refused_at_save(tmp_path):
    model = Hidden()
    model(np.ones((1, 4), "float32"))
    klp.enable_lora_plus(model, rank=2, targets="all-linear")
    with pytest.raises(ValueError, match="no path of attributes, lists and dicts leads to"):
        klp.save_adapter(model, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
