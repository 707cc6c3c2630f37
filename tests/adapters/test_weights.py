"""`load_weights`: nothing in a weights file is dropped, and nothing is half loaded."""

import h5py
import keras
import numpy as np
import pytest
from lora_cases import ONE_OF_EACH, ids, randomize, randomize_factors
from tiny_models import MODELS, compile_model, filled, fit

import keras_loraplus as klp


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def values(model):
    return [to_numpy(variable).copy() for variable in model.weights]


def assert_unchanged(model, before):
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value, err_msg=variable.path)


class Holder(keras.Model):
    """A model around one layer of any type."""

    def __init__(self, case):
        super().__init__(name="holder")
        self.layer = case.make_plain(name="held")
        self.case = case

    def call(self, inputs):
        return self.case.call(self.layer, inputs)


def held(case):
    model = Holder(case)
    model(case.inputs())
    return model


# Keras's own, on the way to an error about weights that do not fit.
not_fitting = pytest.mark.filterwarnings("ignore:Skipping nested container")


@not_fitting
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids(ONE_OF_EACH))
def test_adapted_weights_of_each_layer_type_raise_in_a_plain_model(case, tmp_path):
    """Both through Keras's own `load_weights` and with the hint of this library."""
    model = held(case)
    klp.enable_lora_plus(model, rank=3, alpha=6, targets=["held"])
    randomize_factors(model)
    path = tmp_path / "adapted.weights.h5"
    model.save_weights(path)
    plain = held(case)
    randomize(plain.weights, seed=5)
    before = values(plain)
    with pytest.raises(ValueError, match="could not be loaded"):
        plain.load_weights(path)
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        klp.load_weights(plain, path)
    assert_unchanged(plain, before)
    call = "Enable them first: `keras_loraplus.enable_lora_plus(model, rank=3, alpha=6.0, "
    assert str(error.value).endswith(call + "targets=['held'])`.")
    assert "'held' (layer, rank 3); the model has none" in str(error.value)
    # What the hint says works.
    klp.enable_lora_plus(plain, rank=3, alpha=6.0, targets=["held"])
    klp.load_weights(plain, path)
    np.testing.assert_array_equal(to_numpy(plain(case.inputs())), to_numpy(model(case.inputs())))
    assert np.abs(to_numpy(held(case)(case.inputs())) - to_numpy(plain(case.inputs()))).max() > 0.01


@pytest.mark.parametrize("name", ["functional", "subclassed", "normalised"])
def test_base_weights_load_and_leave_the_factors(name, tmp_path):
    """K03b for `load_weights`: a base file restores the frozen weights of an adapted model."""
    make, inputs = MODELS[name]
    model = make()
    expected = to_numpy(model(inputs()))
    model.save_weights(tmp_path / "base.weights.h5")
    klp.enable_lora_plus(model, rank=2)
    randomize([v for v in model.weights if "lora" not in v.path], seed=77)
    factors = [to_numpy(v).copy() for v in model.trainable_variables if "lora" in v.path]
    assert klp.load_weights(model, tmp_path / "base.weights.h5") is model
    np.testing.assert_array_equal(to_numpy(model(inputs())), expected)
    for variable, value in zip(
        [v for v in model.trainable_variables if "lora" in v.path], factors, strict=True
    ):
        np.testing.assert_array_equal(to_numpy(variable), value)


@not_fitting
def test_nothing_is_half_loaded(tmp_path):
    """The first layers fit, the last does not: Keras writes the first before it raises."""
    model = MODELS["functional"][0]()
    path = tmp_path / "a.weights.h5"
    model.save_weights(path)
    with h5py.File(path, "a") as file:
        head = file["layers/dense_2/vars"]
        del head["0"]
        head["0"] = np.ones((2, 2), "float32")
    twin = MODELS["functional"][0]()
    randomize(twin.weights, seed=5)
    before = values(twin)
    with pytest.raises(ValueError, match=r"(?s)nothing was loaded.*head") as error:
        klp.load_weights(twin, path)
    assert "enable" not in str(error.value)
    assert_unchanged(twin, before)
    with pytest.raises(ValueError, match="could not be loaded"):
        twin.load_weights(path)
    changed = [np.any(to_numpy(v) != w) for v, w in zip(twin.weights, before, strict=True)]
    assert any(changed), "a control: Keras's own loading does leave a mixture"


@not_fitting
@pytest.mark.parametrize(
    "settings, fault",
    [
        ({"rank": 2, "alpha": 5, "targets": ["first"]}, "adapters of 2 layers, of which 1 fit"),
        ({"rank": 3}, "(?s)of which 0 fit.*rank=2, alpha=5.0, targets="),
        ({"rank": 2, "alpha": 4}, "saved with alpha / rank scaling 2.5 but this layer has 2"),
        ({"rank": 2, "alpha": 5, "targets": ["first", "second", "head"]}, r"no adapters .*'head'"),
    ],
)
def test_other_adapters_are_refused(settings, fault, tmp_path):
    model = MODELS["functional"][0]()
    klp.enable_lora_plus(model, rank=2, alpha=5)
    model.save_weights(tmp_path / "a.weights.h5")
    twin = MODELS["functional"][0]()
    klp.enable_lora_plus(twin, **settings)
    randomize(twin.weights, seed=5)
    before = values(twin)
    with pytest.raises(ValueError, match=fault):
        klp.load_weights(twin, tmp_path / "a.weights.h5")
    assert_unchanged(twin, before)


def test_the_hint_names_ranks_and_strengths_of_each_layer(tmp_path):
    model = MODELS["functional"][0]()
    klp.enable_lora_plus(model, rank_pattern={"first": 2, "second": 3}, alpha_pattern={"first": 8})
    model.save_weights(tmp_path / "a.weights.h5")
    twin = MODELS["functional"][0]()
    with pytest.raises(ValueError) as error:
        klp.load_weights(twin, tmp_path / "a.weights.h5")
    hint = str(error.value).split("first: ")[1]
    assert hint == (
        "`keras_loraplus.enable_lora_plus(model, rank=2, rank_pattern={'first': 2, 'second': 3}, "
        "alpha_pattern={'first': 8.0}, targets=['first', 'second'])`."
    )


class Picky(keras.layers.Dense):
    """A user's layer that reads what it knows and ignores the rest."""

    def load_own_variables(self, store):
        self.kernel.assign(store["0"])
        self.bias.assign(store["1"])


def picky():
    inputs = keras.Input((4,))
    x = Picky(5, name="picky")(inputs)
    return filled(keras.Model(inputs, keras.layers.Dense(2, name="head")(x)))


@pytest.mark.parametrize("enabled", [False, True])
def test_what_keras_would_drop_silently_is_an_error(enabled, tmp_path):
    model = picky()
    klp.enable_lora_plus(model, rank=2)
    model.save_weights(tmp_path / "a.weights.h5")
    twin = picky()
    if enabled:
        klp.enable_lora_plus(twin, rank=2)
    twin.load_weights(tmp_path / "a.weights.h5")  # a control: no error
    before = values(twin)
    with pytest.raises(ValueError, match="adapters of 1 layers, of which 0 fit"):
        klp.load_weights(twin, tmp_path / "a.weights.h5")
    assert_unchanged(twin, before)


class Forgetful(keras.layers.Dense):
    """A user's layer that does not load its bias."""

    def load_own_variables(self, store):
        self.kernel.assign(store["0"])


def test_weights_that_are_not_loaded_are_an_error(tmp_path):
    inputs = keras.Input((4,))
    model = filled(keras.Model(inputs, Forgetful(2, name="forgetful")(inputs)))
    path = tmp_path / "a.weights.h5"
    model.save_weights(path)
    randomize(model.weights, seed=5)
    before = values(model)
    with pytest.raises(ValueError, match=r"nothing that fits \['forgetful/bias'\]"):
        klp.load_weights(model, path)
    assert_unchanged(model, before)


def test_a_refused_file_leaves_the_optimizer_as_it_was(tmp_path):
    make, inputs = MODELS["functional"]
    saved = {}
    for rank in (2, 3):
        model = make()
        klp.enable_lora_plus(model, rank=rank)
        compile_model(model, klp.LoRAPlusAdamW(1e-2))
        fit(model, inputs(), epochs=rank)
        saved[rank] = model
        model.save_weights(tmp_path / f"{rank}.weights.h5")
    twin = make()
    klp.enable_lora_plus(twin, rank=2)
    compile_model(twin, klp.LoRAPlusAdamW(1e-2))
    for _ in range(2):  # unbuilt, then built
        klp.load_weights(twin, tmp_path / "2.weights.h5")
        with pytest.raises(ValueError, match="of which 0 fit"):
            klp.load_weights(twin, tmp_path / "3.weights.h5")
        twin.optimizer.build(twin.trainable_variables)
        for ours, right in zip(twin.optimizer.variables, saved[2].optimizer.variables, strict=True):
            np.testing.assert_array_equal(to_numpy(ours), to_numpy(right), err_msg=right.name)


def test_other_files_are_refused(tmp_path):
    model = MODELS["functional"][0]()
    with pytest.raises(ValueError, match=r"ends in '.weights.h5'. Received: 'a.safetensors'"):
        klp.load_weights(model, "a.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        klp.load_weights(model, tmp_path / "none.weights.h5")
    path = tmp_path / "a.weights.h5"
    model.save_weights(path)
    with open(path, "r+b") as file:
        file.truncate(1000)
    before = values(model)
    with pytest.raises(ValueError, match="not a whole weights file"):
        klp.load_weights(model, path)
    assert_unchanged(model, before)
