"""KerasHub backbones and tasks, and two equal towers in one model (K24)."""

import keras
import keras_hub
import numpy as np
import pytest
from lora_cases import all_factors, randomize, randomize_factors, snapshot
from tolerances import FLOAT32_MODEL, assert_close, relative_error

import keras_loraplus as klp

SIZE = {
    "vocabulary_size": 31,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "dropout": 0.0,
    "max_sequence_length": 6,
}


def bert(**kwargs):
    backbone = keras_hub.models.BertBackbone(**SIZE, **kwargs)
    randomize(backbone.weights, seed=3, scale=0.3)
    return backbone


def tokens(count=4, seed=0):
    ids = np.random.default_rng(seed).integers(1, 31, size=(count, 6)).astype("int32")
    return {
        "token_ids": ids,
        "segment_ids": np.zeros_like(ids),
        "padding_mask": np.ones_like(ids),
    }


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def adapted_paths(model):
    return [la.path for la in model._flatten_layers() if klp.layers.is_adapted(la)]


def test_default_targets_are_those_of_the_backbone():
    backbone = bert()
    before = to_numpy(backbone(tokens())["sequence_output"])
    report = klp.enable_lora_plus(backbone, rank=2)
    assert len(report.adapted) == 4
    assert {p.split("/")[-1] for p in adapted_paths(backbone)} == {"query", "value"}
    shapes = {tuple(s) for layer in report.adapted for s in layer.shapes.values()}
    assert shapes == {(8, 2), (2, 2, 4)}
    assert report.trainable_parameters == 4 * (8 * 2 + 2 * 8)
    np.testing.assert_array_equal(to_numpy(backbone(tokens())["sequence_output"]), before)


def test_all_linear_adapts_what_moves_the_output():
    backbone = bert()
    klp.enable_lora_plus(backbone, rank=2, targets="all-linear")
    assert len(adapted_paths(backbone)) == 2 * 6 + 1
    before = {k: to_numpy(v) for k, v in backbone(tokens()).items()}
    for layer in [la for la in backbone._flatten_layers() if klp.layers.is_adapted(la)]:
        saved = snapshot(layer.adapter_variables().values())
        randomize(layer.adapter_variables().values(), scale=2.0)
        after = {k: to_numpy(v) for k, v in backbone(tokens()).items()}
        assert any(relative_error(after[k], before[k]) > 1e-4 for k in before), layer.path
        for variable, value in zip(layer.adapter_variables().values(), saved, strict=True):
            variable.assign(value)


@pytest.mark.parametrize("through", ["task", "backbone"])
def test_a_task_adapts_its_backbone_and_leaves_its_head(through):
    backbone = bert()
    task = keras_hub.models.BertTextClassifier(backbone, num_classes=3, preprocessor=None)
    before = to_numpy(task(tokens()))
    report = klp.enable_lora_plus(task if through == "task" else backbone, rank=2)
    np.testing.assert_array_equal(to_numpy(task(tokens())), before)
    trained = [v.path for v in task.trainable_variables]
    head = [path for path in trained if "lora" not in path]
    assert sorted(head) == ["logits/bias", "logits/kernel"]
    assert len(trained) == 2 + 8
    assert report.trainable_parameters == 4 * 32 + (27 if through == "task" else 0)
    still = [v for v in task.weights if not v.trainable]
    frozen, moving = snapshot(still), snapshot(task.trainable_variables)
    task.compile(
        klp.LoRAPlusAdamW(1e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    task.fit(tokens(), np.array([0, 1, 2, 1]), epochs=2, batch_size=2, verbose=0)
    for variable, value in zip(still, frozen, strict=True):
        if "seed" not in variable.path:
            np.testing.assert_array_equal(to_numpy(variable), value)
    for variable, value in zip(task.trainable_variables, moving, strict=True):
        assert not np.array_equal(to_numpy(variable), value), variable.path
    expected = to_numpy(task(tokens()))
    klp.merge_lora_plus(task)
    assert_close(to_numpy(task(tokens())), expected, FLOAT32_MODEL)
    assert adapted_paths(task) == []
    assert len(task.trainable_variables) == len([v for v in task.weights if "seed" not in v.path])


def test_two_equal_backbones_in_one_model():
    left, right = bert(name="left"), bert(name="right")

    def inputs(side):
        return {name: keras.Input((6,), dtype="int32", name=f"{side}_{name}") for name in tokens()}

    a, b = inputs("a"), inputs("b")
    both = keras.ops.concatenate([left(a)["pooled_output"], right(b)["pooled_output"]], axis=-1)
    model = keras.Model([a, b], keras.layers.Dense(3, name="head")(both))
    report = klp.enable_lora_plus(model, rank=2, targets=[".*(query|value)", "query", "value"])
    factors = all_factors(model)
    assert len(report.adapted) == 8
    assert len({id(v) for v in factors}) == len(factors) == 16
    assert {id(v) for v in factors} <= {id(v) for v in model.trainable_variables}
    ids = [id(v) for v in model.trainable_variables]
    assert len(ids) == len(set(ids))
    optimizer = klp.LoRAPlusAdamW(1e-2)
    model.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert len(klp.assignments(model)) == len(ids)
    before = snapshot(factors)
    x = [tokens(seed=1), tokens(seed=2)]
    model.fit(x, np.array([0, 1, 2, 1]), epochs=2, batch_size=2, verbose=0)
    for variable, value in zip(factors, before, strict=True):
        assert not np.array_equal(to_numpy(variable), value), variable.path
    expected = to_numpy(model(x))
    klp.merge_lora_plus(model)
    assert_close(to_numpy(model(x)), expected, FLOAT32_MODEL)


def test_weight_files_of_a_backbone(tmp_path):
    backbone = bert()
    expected = to_numpy(backbone(tokens())["pooled_output"])
    backbone.save_weights(tmp_path / "base.weights.h5")
    klp.enable_lora_plus(backbone, rank=2, targets="all-linear")
    randomize([v for v in backbone.weights if "lora" not in v.path], seed=9)
    backbone.load_weights(tmp_path / "base.weights.h5")
    np.testing.assert_array_equal(to_numpy(backbone(tokens())["pooled_output"]), expected)
    randomize_factors(backbone)
    adapted = to_numpy(backbone(tokens())["pooled_output"])
    backbone.save_weights(tmp_path / "adapted.weights.h5")
    twin = bert()
    klp.enable_lora_plus(twin, rank=2, targets="all-linear")
    randomize(twin.weights, seed=10)
    twin.load_weights(tmp_path / "adapted.weights.h5")
    np.testing.assert_array_equal(to_numpy(twin(tokens())["pooled_output"]), adapted)


def test_a_language_model_with_a_reversible_embedding():
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=31,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=6,
    )
    task = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    randomize(task.weights, seed=3, scale=0.3)
    x = {k: v for k, v in tokens().items() if k != "segment_ids"}
    before = to_numpy(task(x))
    klp.enable_lora_plus(task, rank=2, targets=[".*token_embedding", ".*(query|value)"])
    np.testing.assert_array_equal(to_numpy(task(x)), before)
    randomize_factors(task)
    adapted = to_numpy(task(x))
    assert relative_error(adapted, before) > 1e-2
    klp.merge_lora_plus(task)
    assert_close(to_numpy(task(x)), adapted, FLOAT32_MODEL)


def test_default_targets_of_a_backbone_without_such_layers():
    """FNet has no attention, a ResNet no dense layer: all that is linear stands in."""
    fnet = keras_hub.models.FNetBackbone(
        vocabulary_size=31, num_layers=1, hidden_dim=8, intermediate_dim=12
    )
    report = klp.enable_lora_plus(fnet, rank=2)
    assert {layer.layer_class for layer in report.adapted} == {"Dense"}
    assert len(report.adapted) == 4
    resnet = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=(8, 8, 3),
    )
    report = klp.enable_lora_plus(resnet, rank=2)
    assert [layer.layer_class for layer in report.adapted] == ["Conv2D"] * 3


def test_experts_are_reported_as_left_out():
    backbone = keras_hub.models.MixtralBackbone(
        vocabulary_size=31,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=12,
        num_experts=3,
    )
    for targets in (None, "all-linear"):
        report = klp.enable_lora_plus(backbone, rank=2, targets=targets)
        ((path, reason),) = report.skipped
        assert path.endswith("sparse_moe_block/experts") or "moe" in path
        assert "MixtralMoeExperts is adapted only where `targets` name it" in reason
        assert "expert_feedforward_gate_dense (3, 8, 12)" in reason
        assert reason in str(report)
        klp.merge_lora_plus(backbone)
    report = klp.enable_lora_plus(backbone, rank=2, targets=[".*experts", "query"])
    found = {layer.layer_class for layer in report.adapted}
    assert found == {"MixtralMoeExperts", "EinsumDense"}
    assert report.skipped == ()
