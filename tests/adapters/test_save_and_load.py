"""`save_adapter` and `load_adapter`: what trains is what is saved, and nothing is half loaded."""

import keras
import numpy as np
import pytest
import safetensors
from adapter_cases import assert_unchanged, inputs, perturb, small_model, values
from keras import ops
from tolerances import EXACT, assert_close

import keras_loraplus as klp
from keras_loraplus.__main__ import main
from keras_loraplus.adapters import files

BERT = {
    "vocabulary_size": 30,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
    "max_sequence_length": 6,
}


def test_every_trained_variable_comes_back(saved):
    model, path = saved
    expected = model.predict(inputs(), verbose=0)
    twin = small_model()
    klp.enable_lora_plus(twin, rank=2, alpha=5, trainable=".*bias")
    untrained = twin.predict(inputs(), verbose=0)
    assert klp.load_adapter(twin, path) is twin
    assert np.abs(untrained - expected).max() > 0.1
    assert_close(twin.predict(inputs(), verbose=0), expected, EXACT)


def test_a_model_without_adapters_takes_them_from_the_file(saved):
    model, path = saved
    twin = small_model()
    klp.load_adapter(twin, path)
    assert_close(twin.predict(inputs(), verbose=0), model.predict(inputs(), verbose=0), EXACT)
    names = lambda m: [(v.name, tuple(v.shape)) for v in m.trainable_variables]  # noqa: E731
    assert names(twin) == names(model)
    assert twin.layers[0].adapter == model.layers[0].adapter
    klp.merge_lora_plus(twin)
    assert all(type(layer) is keras.layers.Dense for layer in (twin.layers[0], twin.layers[3]))


def test_include_trainable_false_keeps_to_the_factors(saved, tmp_path):
    model, _ = saved
    path = str(tmp_path / "factors.safetensors")
    klp.save_adapter(model, path, include_trainable=False)
    with safetensors.safe_open(path, framework="np") as file:
        assert sorted(file.keys()) == [
            f"layers.{layer}/lora_kernel_{side}" for layer in (0, 1) for side in "ab"
        ]
    twin = small_model()
    klp.enable_lora_plus(twin, rank=2, alpha=5, trainable=".*bias")
    klp.load_adapter(twin, path)
    for layer in (0, 1):
        for name, variable in twin.layers[layer].adapter_variables().items():
            assert_close(variable, model.layers[layer].adapter_variables()[name], EXACT)


def rewrite(path, change):
    """Writes a whole file with other tensors, as somebody else's model would have."""
    content = files.read(path)
    change(content.tensors)
    files.write(path, content)


def drop_and_add(tensors):
    del tensors["layers.0/lora_kernel_a"]
    tensors["layers.9/lora_kernel_a"] = np.ones((2, 2), "float32")
    tensors["layers.1/lora_kernel_b"] = np.ones((2, 2), "float32")
    tensors["layers.3/bias"] = np.full((3,), np.nan, "float32")


@pytest.mark.parametrize("enabled", [True, False])
def test_all_faults_are_listed_and_nothing_has_changed(saved, enabled):
    _, path = saved
    rewrite(path, drop_and_add)
    twin = small_model()
    if enabled:
        klp.enable_lora_plus(twin, rank=2, alpha=5, trainable=".*bias")
    classes, flags = [type(la) for la in twin.layers], [v.trainable for v in twin.weights]
    before = values(twin)
    with pytest.raises(ValueError) as error:
        klp.load_adapter(twin, path)
    for fault in (
        "missing: layers.0/lora_kernel_a",
        "unexpected: layers.9/lora_kernel_a",
        "shape: layers.1/lora_kernel_b is (2, 2) in the file and (2, 6) in the model",
        "not finite: layers.3/bias",
    ):
        assert fault in str(error.value)
    assert_unchanged(twin, before)
    assert [type(la) for la in twin.layers] == classes
    assert [v.trainable for v in twin.weights] == flags


@pytest.mark.parametrize(
    "settings, fault",
    [({"alpha": 4}, "alpha: layers.0 has 5"), ({"alpha": 5, "scaling": "rslora"}, "scaling: ")],
)
def test_another_strength_is_a_fault(saved, settings, fault):
    _, path = saved
    twin = small_model()
    klp.enable_lora_plus(twin, rank=2, trainable=".*bias", **settings)
    before = values(twin)
    with pytest.raises(ValueError, match=fault):
        klp.load_adapter(twin, path)
    assert_unchanged(twin, before)


def test_another_rank_is_a_fault(saved):
    twin = small_model()
    klp.enable_lora_plus(twin, rank=3, alpha=5, trainable=".*bias")
    with pytest.raises(ValueError, match="rank: layers.0 has 2 in the file and 3 here"):
        klp.load_adapter(twin, saved[1])


def test_layers_that_the_model_lacks_are_named(saved):
    other = keras.Sequential([keras.Input((5,)), keras.layers.Dense(7)])
    with pytest.raises(ValueError, match=r"does not have: \['layers.1'\]"):
        klp.load_adapter(other, saved[1])


def test_missing_files_and_folders(saved, tmp_path):
    model, _ = saved
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        klp.load_adapter(model, str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="folder"):
        klp.save_adapter(model, str(tmp_path / "none" / "a.safetensors"))
    with pytest.raises(ValueError, match="no LoRA\\+ adapters to save"):
        klp.save_adapter(small_model(), str(tmp_path / "a.safetensors"))


def test_inspection_needs_no_model(saved, capsys):
    inspection = klp.inspect_adapter(saved[1])
    assert inspection.adapters == {
        f"layers.{layer}": {
            "rank": 2,
            "alpha": 5,
            "init": "loraplus",
            "scaling": "standard",
            "dropout": 0.0,
        }
        for layer in (0, 1)
    }
    assert inspection.tensors["layers.1/lora_kernel_b"] == ("float32", (2, 6))
    assert inspection.parameters == sum(value.size for value in values_trained(saved[0]))
    assert main(["inspect", saved[1]]) == 0
    shown = capsys.readouterr().out
    assert shown == f"{inspection}\n"
    assert "layers.0: rank 2, alpha 5" in shown and "float32  2 x 6" in shown
    assert main(["inspect", saved[1] + ".none"]) == 2
    assert capsys.readouterr().err.startswith("error: There is no adapter file")


def values_trained(model):
    return [ops.convert_to_numpy(variable) for variable in model.trainable_variables]


def renamed(tensors):
    """A prefix more, as a wrapper around the model would give."""
    for key in list(tensors):
        tensors[f"backbone/{key}"] = tensors.pop(key)


def test_a_renamed_prefix_is_both_missing_and_unexpected(saved):
    _, path = saved
    names = list(files.read(path).tensors)
    rewrite(path, renamed)
    twin = small_model()
    klp.enable_lora_plus(twin, rank=2, alpha=5, trainable=".*bias")
    before = values(twin)
    with pytest.raises(ValueError) as error:
        klp.load_adapter(twin, path)
    for key in names:
        assert f"missing: {key}" in str(error.value)
        assert f"unexpected: backbone/{key}" in str(error.value)
    assert_unchanged(twin, before)


def stack(count, width=5):
    return keras.Sequential(
        [
            keras.Input((width,)),
            *[keras.layers.Dense(width, activation="tanh") for _ in range(count)],
            keras.layers.Dense(3),
        ]
    )


@pytest.mark.parametrize("include_trainable", [True, False])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_layer_more_or_less_of_the_same_shape_is_an_error(
    tmp_path, include_trainable, count, enabled
):
    """K01: positions alone would put A and B beside another kernel of the same shape."""
    model = stack(3)
    klp.enable_lora_plus(model, rank=2, targets=[la.name for la in model.layers[:2]])
    perturb(model)
    path = klp.save_adapter(model, tmp_path / "a.safetensors", include_trainable=include_trainable)
    twin = stack(count)
    if enabled:
        klp.enable_lora_plus(twin, rank=2, targets=[la.name for la in twin.layers[:2]])
    before = values(twin)
    with pytest.raises(ValueError, match="layers.0") as error:
        klp.load_adapter(twin, path)
    assert f"layers.0/kernel was one of 3 matrices of shape (5, 5) and is one of {count}" in str(
        error.value
    )
    assert_unchanged(twin, before)


def test_factors_alone_fit_a_model_with_another_head(tmp_path):
    model = small_model()
    klp.enable_lora_plus(model, rank=2)
    perturb(model)
    path = klp.save_adapter(model, tmp_path / "a.safetensors", include_trainable=False)
    twin = small_model()
    body = keras.Model(twin.inputs, twin.layers[-2].output)
    other = keras.Sequential([*body.layers[1:], keras.layers.Dense(9)])
    other(inputs())
    klp.load_adapter(other, path)
    for layer in (0, 1):
        for name, variable in other.layers[layer].adapter_variables().items():
            assert_close(variable, model.layers[layer].adapter_variables()[name], EXACT)


def test_another_base_is_told(saved):
    model, path = saved
    other = small_model(seed=9)
    with pytest.warns(
        UserWarning, match=r"other frozen weights .*layers.0/kernel \(other values\)"
    ):
        klp.load_adapter(other, path)
    half = small_model()
    half.layers[0].kernel.assign(ops.cast(ops.cast(half.layers[0].kernel, "float16"), "float32"))
    klp.load_adapter(half, path)  # the same weights, rounded: no warning, which would be an error


def test_a_bfloat16_head_comes_back_exactly(tmp_path):
    def make():
        keras.config.set_dtype_policy("bfloat16")
        return small_model()

    model = make()
    klp.enable_lora_plus(model, rank=2)
    perturb(model)
    path = str(tmp_path / "a.safetensors")
    klp.save_adapter(model, path)
    twin = klp.load_adapter(make(), path)
    assert twin.layers[3].kernel.dtype == "bfloat16"
    for ours, theirs in zip(twin.trainable_variables, model.trainable_variables, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(
            ops.convert_to_numpy(ops.cast(ours, "float32")),
            ops.convert_to_numpy(ops.cast(theirs, "float32")),
            EXACT,
        )


def dual_encoder():
    import keras_hub

    keras.utils.set_random_seed(3)
    names = ("token_ids", "segment_ids", "padding_mask")
    towers, vectors, model_inputs = [], [], {}
    for side in ("left", "right"):
        tower = keras_hub.models.BertBackbone(**BERT)
        own = {name: keras.Input((6,), dtype="int32", name=f"{side}_{name}") for name in names}
        model_inputs.update({f"{side}_{name}": tensor for name, tensor in own.items()})
        towers.append(tower)
        vectors.append(tower(own)["pooled_output"])
    return keras.Model(model_inputs, keras.layers.Dot(axes=1)(vectors)), towers


def test_two_equal_backbones_keep_their_own_adapters(tmp_path):
    model, towers = dual_encoder()
    report = klp.enable_lora_plus(model, rank=2, targets=["query", "value"])
    assert len(report.adapted) == 8
    assert len({id(v) for v in model.trainable_variables}) == len(model.trainable_variables) == 16
    perturb(model)
    path = str(tmp_path / "dual.safetensors")
    klp.save_adapter(model, path)

    twin, twin_towers = dual_encoder()
    klp.load_adapter(twin, path)
    for tower, twin_tower in zip(towers, twin_towers, strict=True):
        for ours, theirs in zip(
            twin_tower.trainable_variables, tower.trainable_variables, strict=True
        ):
            assert_close(ours, theirs, EXACT)
    left, right = (tower.trainable_variables[0] for tower in twin_towers)
    assert np.abs(ops.convert_to_numpy(left) - ops.convert_to_numpy(right)).max() > 0.1
