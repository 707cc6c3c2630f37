"""Named adapters: each trains as if it were alone, on one trace, and none is lost."""

import copy

import keras
import numpy as np
import pytest
from keras import ops
from lora_cases import CASES, ONE_OF_EACH, as_float64, factors, ids, randomize, snapshot
from tiny_models import features, functional, labels
from tolerances import FLOAT32_LAYER, FLOAT32_MODEL, assert_close

import keras_loraplus as klp

EXPERTS = [case for case in CASES if case.name == "einsum-experts"]
X, Y = features(), labels()
CALLS = []


@keras.saving.register_keras_serializable("tests")
def counted_loss(y_true, y_pred):
    """Python runs this once a trace, and once a step where nothing is traced."""
    CALLS.append(1)
    return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)


def start(model, rank, max_rank, optimizer=None):
    """Enables a model with adapters that are the same for one rank, whatever room they have."""
    keras.utils.set_random_seed(0)
    klp.enable_lora_plus(model, rank=rank, alpha=3, max_rank=max_rank)
    model.compile(optimizer or klp.LoRAPlusAdamW(0.02, weight_decay=0.1), counted_loss)
    return model


def seed_factors(model, seed):
    """Writes factors of the active rank that depend on rank and seed alone, zeros beyond."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if klp.layers.is_adapted(layer):
            for name, factor in layer.factors().items():
                value = rng.normal(size=factor.shape).astype("float32") * 0.3
                getattr(layer, name).assign(factor.padded(value, layer.adapter.width))


def steps(model, count, offset=0):
    for step in range(count):
        at = slice((offset + step) % 3 * 4, (offset + step) % 3 * 4 + 4)
        model.fit(X[at], Y[at], batch_size=4, shuffle=False, verbose=0)


def outputs(model):
    return np.array(model.predict(X, verbose=0))


def own_factors(model):
    """Returns the active adapter's A and B without what stands beyond its rank."""
    return [
        factor.stripped(as_float64(getattr(layer, name)))
        for layer in model._flatten_layers()
        if klp.layers.is_adapted(layer)
        for name, factor in layer.factors().items()
    ]


@pytest.mark.parametrize("case", ONE_OF_EACH + EXPERTS, ids=ids(ONE_OF_EACH + EXPERTS))
def test_room_for_more_ranks_changes_no_output(case):
    layer = case.make(max_rank=5)
    case.call(layer)
    for variable, (name, factor) in zip(factors(layer), layer.factors().items(), strict=True):
        assert variable.shape == factor.shape_at(5), name
        assert variable.shape[factor.rank_axis] == 5
        beyond = np.take(as_float64(variable), range(3, 5), axis=factor.rank_axis)
        assert not beyond.any()
    randomize(factors(layer), scale=0.3)
    for variable, factor in zip(factors(layer), layer.factors().values(), strict=True):
        variable.assign(factor.padded(factor.stripped(as_float64(variable)).astype("float32"), 5))
    stripped = {
        name: factor.stripped(as_float64(getattr(layer, name)))
        for name, factor in layer.factors().items()
    }
    assert_close(
        ops.convert_to_numpy(case.call(layer)),
        case.expected(layer, overrides=stripped),
        FLOAT32_LAYER,
    )


@pytest.mark.parametrize("init", ["loraplus", "lora"])
def test_initial_values_are_those_of_the_rank(init):
    layer = klp.layers.LoRAPlusDense(40, rank=4, max_rank=16, init=init)
    layer.build((None, 30))
    a, b = as_float64(layer.lora_kernel_a), as_float64(layer.lora_kernel_b)
    drawn, zero, bound = (b[:4], a, 4**-0.5) if init == "loraplus" else (a[:, :4], b, 30**-0.5)
    assert not zero.any()
    assert 0.9 * bound < np.abs(drawn).max() <= bound
    assert np.count_nonzero(drawn) == drawn.size


@pytest.mark.parametrize("room", [8, None], ids=["same room", "own room"])
def test_trained_in_turns_equals_trained_alone(room, backend):
    alone = {}
    for rank, seed in ((4, 1), (8, 2)):
        model = start(functional(), rank, room)
        seed_factors(model, seed)
        steps(model, 6, offset=seed)
        alone[rank] = own_factors(model), outputs(model), snapshot(model.trainable_variables)

    model = start(functional(), 4, 8)
    seed_factors(model, 1)
    klp.add_adapter(model, "eight", rank=8, alpha=3)
    small = outputs(model)
    klp.set_adapter(model, "eight")
    seed_factors(model, 2)
    for turn in range(3):
        steps(model, 2, offset=2 + 2 * turn)
        if not turn:
            CALLS.clear()  # TensorFlow traces twice while it makes variables
        klp.set_adapter(model, "default")
        steps(model, 2, offset=1 + 2 * turn)
        klp.set_adapter(model, "eight")
    assert len(CALLS) == (10 if backend == "torch" else 0)
    for name, rank in (("eight", 8), ("default", 4)):
        klp.set_adapter(model, name)
        expected, expected_outputs, _ = alone[rank]
        for actual, value in zip(own_factors(model), expected, strict=True):
            assert_close(actual, value, FLOAT32_MODEL)
        assert_close(outputs(model), expected_outputs, FLOAT32_MODEL)
        assert np.abs(outputs(model) - small).max() > 1e-2
        if room:
            for variable, value in zip(model.trainable_variables, alone[rank][2], strict=True):
                assert_close(ops.convert_to_numpy(variable), value, FLOAT32_MODEL)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: klp.LoRAPlusAdamW(0.02, use_ema=True, gradient_accumulation_steps=2),
        lambda: keras.optimizers.LossScaleOptimizer(klp.LoRAPlusAdamW(0.02)),
        lambda: klp.loraplus(keras.optimizers.Nadam)(0.02),
        lambda: klp.LoRAPlusAdamW(keras.optimizers.schedules.ExponentialDecay(0.02, 2, 0.9)),
    ],
    ids=["ema and accumulation", "loss scale", "nadam", "schedule"],
)
def test_the_optimizers_state_goes_with_its_adapter(optimizer):
    model = start(functional(), 4, 8, optimizer())
    steps(model, 3)
    trained = snapshot(model.optimizer.variables)
    klp.add_adapter(model, "new", rank=2)
    klp.set_adapter(model, "new")
    fresh = start(functional(), 4, 8, optimizer())
    fresh.optimizer.build(fresh.trainable_variables)
    for variable, expected in zip(
        model.optimizer.variables, fresh.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(as_float64(variable), as_float64(expected), variable.path)
    steps(model, 2)
    klp.set_adapter(model, "default")
    for variable, expected in zip(model.optimizer.variables, trained, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), expected, variable.path)
    assert any(value.any() for value in trained)


def test_the_learning_rate_stays():
    model = start(functional(), 4, 8)
    steps(model, 1)
    klp.add_adapter(model, "new")
    model.optimizer.learning_rate = 0.005
    klp.set_adapter(model, "new")
    assert float(model.optimizer.learning_rate) == pytest.approx(0.005)


def test_state_of_another_optimizer_is_not_taken():
    model = start(functional(), 4, 8)
    klp.add_adapter(model, "new")
    steps(model, 2)
    klp.set_adapter(model, "new")
    model.compile(klp.LoRAPlusAdamW(0.02), counted_loss)
    steps(model, 1)
    klp.set_adapter(model, "default")
    assert int(model.optimizer.iterations) == 0


def test_only_the_active_adapter_and_its_head_train():
    model = start(functional(), 4, 8)
    head = model.get_layer("head").kernel
    at_first = as_float64(head)
    klp.add_adapter(model, "new", rank=2)
    steps(model, 2)
    trained = own_factors(model), as_float64(head)
    assert np.abs(trained[1] - at_first).max() > 1e-3
    klp.set_adapter(model, "new")
    np.testing.assert_array_equal(as_float64(head), at_first)
    steps(model, 2)
    klp.set_adapter(model, "default")
    for actual, expected in zip(own_factors(model), trained[0], strict=True):
        np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(as_float64(head), trained[1])


def test_settings_of_each_adapter():
    model = start(functional(), 4, 8)
    klp.add_adapter(model, "new", rank=2, alpha=5, scaling="rslora", rank_pattern={"layers.2": 6})
    listed = klp.list_adapters(model)
    assert list(listed) == ["default", "new"]
    assert {path: spec.rank for path, spec in listed["new"].items()} == {
        "layers.1": 2,
        "layers.2": 6,
    }
    assert {spec.rank for spec in listed["default"].values()} == {4}
    klp.set_adapter(model, "new")
    assert klp.active_adapter(model) == "new"
    assert klp.list_adapters(model) == listed
    first = model.get_layer("first")
    assert float(first.lora_scaling) == pytest.approx(5 / 2**0.5)
    klp.set_adapter(model, "default")
    assert float(first.lora_scaling) == pytest.approx(3 / 4)
    klp.delete_adapter(model, "new")
    assert list(klp.list_adapters(model)) == ["default"]


def test_a_backbone_inside_a_classifier(hub_backbone):
    backbone, classifier, inputs, targets = hub_backbone
    klp.enable_lora_plus(backbone, rank=2, max_rank=4)
    classifier.compile(klp.LoRAPlusAdamW(0.01), counted_loss)
    klp.add_adapter(classifier, "new", rank=4)
    base = classifier.predict(inputs, verbose=0)
    classifier.fit(inputs, targets, verbose=0)
    trained = classifier.predict(inputs, verbose=0)
    assert np.abs(trained - base).max() > 1e-4
    klp.set_adapter(classifier, "new")
    np.testing.assert_array_equal(classifier.predict(inputs, verbose=0), base)
    klp.set_adapter(classifier, "default")
    np.testing.assert_array_equal(classifier.predict(inputs, verbose=0), trained)
    with pytest.raises(ValueError, match=f"through the model '{classifier.name}'"):
        klp.set_adapter(backbone, "new")


@pytest.fixture
def hub_backbone():
    import keras_hub

    keras.utils.set_random_seed(1)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=20, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    )
    pooled = keras.layers.Dense(3, name="head")(backbone.output["pooled_output"])
    classifier = keras.Model(backbone.input, pooled, name="classifier")
    rng = np.random.default_rng(0)
    inputs = {
        "token_ids": rng.integers(1, 20, size=(6, 5)),
        "segment_ids": np.zeros((6, 5), "int32"),
        "padding_mask": np.ones((6, 5), "int32"),
    }
    return backbone, classifier, inputs, rng.integers(0, 3, size=6)


def test_merging_refuses_to_lose_adapters():
    model = start(functional(), 4, 8)
    klp.add_adapter(model, "new")
    steps(model, 2)
    before = outputs(model)
    with pytest.raises(ValueError, match=r"lost: \['new'\]"):
        klp.merge_lora_plus(model)
    np.testing.assert_array_equal(outputs(model), before)
    klp.delete_adapter(model, "new")
    klp.merge_lora_plus(model)
    assert_close(outputs(model), before, FLOAT32_MODEL)
    klp.enable_lora_plus(model, rank=2)
    assert klp.active_adapter(model) == "default"


def test_saving_with_keras_says_that_it_saves_the_active_adapter_alone(tmp_path):
    model = start(functional(), 4, 8)
    klp.add_adapter(model, "new")
    steps(model, 2)
    with pytest.warns(UserWarning, match=r"'default' .* alone, not \['new'\]") as caught:
        model.save_weights(tmp_path / "a.weights.h5")
    assert len([w for w in caught if "alone" in str(w.message)]) == 1
    # Keras copies a model by saving it.
    with pytest.warns(UserWarning, match="alone"):
        twin = copy.deepcopy(model)
    assert list(klp.list_adapters(twin)) == ["default"]
    np.testing.assert_array_equal(outputs(twin), outputs(model))


def test_bad_input_is_refused_and_changes_nothing():
    model = start(functional(), 4, 8)
    with pytest.raises(ValueError, match="no LoRA\\+ adapters"):
        klp.list_adapters(functional())
    klp.add_adapter(model, "new")
    before, listed = outputs(model), klp.list_adapters(model)
    refused = [
        (lambda: klp.add_adapter(model, "new"), "already has an adapter named 'new'"),
        (lambda: klp.add_adapter(model, "default"), "already has"),
        (lambda: klp.add_adapter(model, ""), "must be a text"),
        (lambda: klp.add_adapter(model, 3), "must be a text"),
        (lambda: klp.add_adapter(model, "big", rank=9), "at least the rank, 9"),
        (lambda: klp.add_adapter(model, "bad", rank=0), "positive integer"),
        (
            lambda: klp.add_adapter(model, "bad", rank_pattern={"x": 2}),
            r"without an adapter: \['x'\]",
        ),
        (lambda: klp.set_adapter(model, "old"), "no adapter named 'old'"),
        (lambda: klp.delete_adapter(model, "old"), "no adapter named 'old'"),
        (lambda: klp.delete_adapter(model, "default"), "is active"),
    ]
    for act, match in refused:
        with pytest.raises(ValueError, match=match):
            act()
    with klp.adapters_disabled(model), pytest.raises(ValueError, match="disabled"):
        klp.set_adapter(model, "new")
    assert klp.list_adapters(model) == listed
    assert klp.active_adapter(model) == "default"
    np.testing.assert_array_equal(outputs(model), before)


def test_a_model_without_room_says_how_to_get_it():
    model = start(functional(), 4, None)
    with pytest.raises(ValueError, match="max_rank=..."):
        klp.add_adapter(model, "new")
    for bad in (3, True, 4.0, "8"):
        with pytest.raises(ValueError, match="`max_rank` must be None or an integer"):
            klp.enable_lora_plus(functional(), rank=4, max_rank=bad)


def trained_pair():
    """Two trained adapters of ranks 4 (active) and 2, and the outputs of each."""
    model = start(functional(), 4, 8)
    klp.add_adapter(model, "new", rank=2, alpha=5, scaling="rslora")
    steps(model, 3)
    first = outputs(model)
    klp.set_adapter(model, "new")
    steps(model, 3)
    second = outputs(model)
    klp.set_adapter(model, "default")
    assert np.abs(first - second).max() > 1e-2
    return model, first, second


def test_each_saves_and_loads_alone(tmp_path):
    model, first, second = trained_pair()
    klp.save_adapter(model, tmp_path / "first.safetensors")
    klp.save_adapter(model, tmp_path / "second.safetensors", adapter="new")
    content = klp.inspect_adapter(tmp_path / "second.safetensors")
    assert content.tensors["layers.1/lora_kernel_a"][1] == (6, 2)
    assert content.adapters["layers.1"]["rank"] == 2
    assert "max_rank" not in content.adapters["layers.1"]

    for name, expected in (("first", first), ("second", second)):
        plain = klp.load_adapter(functional(), tmp_path / f"{name}.safetensors")
        assert_close(outputs(plain), expected, FLOAT32_MODEL)
        with pytest.raises(ValueError, match="room for one adapter"):
            klp.add_adapter(plain, "more")

    other = start(functional(), 3, 8)
    klp.load_adapter(other, tmp_path / "first.safetensors", adapter="one")
    klp.load_adapter(other, tmp_path / "second.safetensors", adapter="two")
    untouched = outputs(start(functional(), 3, 8))
    np.testing.assert_array_equal(outputs(other), untouched)
    assert list(klp.list_adapters(other)) == ["default", "one", "two"]
    for name, expected in (("one", first), ("two", second), ("default", untouched)):
        klp.set_adapter(other, name)
        assert_close(outputs(other), expected, FLOAT32_MODEL)
    # Into one that is there already, active or not.
    klp.set_adapter(model, "new")
    for layer in (model.get_layer("first"), model.get_layer("second")):
        randomize(factors(layer))
    klp.load_adapter(model, tmp_path / "second.safetensors", adapter="new")
    assert_close(outputs(model), second, FLOAT32_MODEL)
    klp.load_adapter(model, tmp_path / "first.safetensors", adapter="default")
    klp.set_adapter(model, "default")
    assert_close(outputs(model), first, FLOAT32_MODEL)


def test_a_file_that_does_not_fit_adds_nothing(tmp_path):
    model, first, _ = trained_pair()
    klp.save_adapter(model, tmp_path / "a.safetensors")
    small = start(functional(), 2, 3)
    before = outputs(small)
    with pytest.raises(ValueError, match="at least the rank, 4"):
        klp.load_adapter(small, tmp_path / "a.safetensors", adapter="one")
    with pytest.raises(ValueError, match=r"rank: layers.1 has 4 in the file and 2 here"):
        klp.load_adapter(model, tmp_path / "a.safetensors", adapter="new")
    with pytest.raises(ValueError, match="needs a model that has adapters"):
        klp.load_adapter(functional(), tmp_path / "a.safetensors", adapter="one")
    with pytest.raises(ValueError, match="no adapter named 'old'"):
        klp.save_adapter(model, tmp_path / "b.safetensors", adapter="old")
    assert not (tmp_path / "b.safetensors").exists()
    assert list(klp.list_adapters(small)) == ["default"]
    np.testing.assert_array_equal(outputs(small), before)
    np.testing.assert_array_equal(outputs(model), first)
