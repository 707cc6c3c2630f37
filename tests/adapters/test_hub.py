"""`.lora.h5` files of KerasHub: the oracle is KerasHub's own model with its own LoRA."""

import h5py
import keras
import keras_hub
import numpy as np
import pytest
from lora_cases import randomize, snapshot
from tolerances import FLOAT32_MODEL, assert_close, relative_error

import keras_loraplus as klp

SIZE = {"vocabulary_size": 31, "num_layers": 1, "hidden_dim": 12, "intermediate_dim": 16}


def bert(**kwargs):
    """The one with two layers, so that indices matter."""
    size = {**SIZE, "num_layers": 2, "num_heads": 3, "max_sequence_length": 6}
    return keras_hub.models.BertBackbone(**size, dropout=0.0, **kwargs)


def gemma():
    return keras_hub.models.GemmaBackbone(
        **SIZE, num_query_heads=4, num_key_value_heads=2, head_dim=4
    )


def llama():
    return keras_hub.models.Llama3Backbone(**SIZE, num_query_heads=3, num_key_value_heads=1)


def gpt2():
    return keras_hub.models.GPT2Backbone(**SIZE, num_heads=3, max_sequence_length=6, dropout=0.0)


def tokens(model):
    ids = np.random.default_rng(0).integers(1, 31, size=(3, 6)).astype("int32")
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    if "segment_ids" in model.input:
        inputs["segment_ids"] = np.zeros_like(ids)
    return inputs


def outputs(model):
    found = model(tokens(model))
    found = found["sequence_output"] if isinstance(found, dict) else found
    return keras.ops.convert_to_numpy(keras.ops.cast(found, "float32"))


def filled(make, **kwargs):
    backbone = make(**kwargs)
    randomize(backbone.weights, seed=3, scale=0.3)
    return backbone


def written(backbone, path, targets=None):
    """Writes a file with KerasHub alone."""
    backbone.enable_lora(2, targets)
    factors = [v for v in backbone.weights if v.name.startswith("lora_kernel")]
    randomize(factors, seed=7, scale=0.5)
    backbone.save_lora_weights(str(path))
    return backbone


def saved(make, path, targets=None):
    """Writes a file; returns the outputs with and without the adapters."""
    backbone = filled(make)
    base = outputs(backbone)
    return outputs(written(backbone, path, targets)), base


def ranks(model):
    return {
        layer.name: layer.adapter.rank
        for layer in model._flatten_layers()
        if klp.layers.is_adapted(layer)
    }


ALL = [
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
    "pooled_dense",
]
CASES = {
    "bert": (bert, None, {"query": 6, "value": 6}),
    "bert-all": (
        bert,
        ALL,
        {
            **dict.fromkeys(ALL, 2),
            **dict.fromkeys(("query", "key", "value"), 6),
        },
    ),
    "gemma": (gemma, None, {"query": 8, "value": 4}),
    "llama": (llama, ["query", "value", "attention_output"], None),
    "gpt2": (gpt2, None, {"query": 6, "value": 6}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_backbone_gives_the_outputs_of_the_saved_one(name, tmp_path, capsys):
    make, targets, expected_ranks = CASES[name]
    path = tmp_path / "x.lora.h5"
    expected, base = saved(make, path, targets)
    twin = filled(make)
    assert relative_error(expected, base) > 1e-2
    assert_close(outputs(twin), base, FLOAT32_MODEL)
    assert klp.load_adapter(twin, str(path)) is twin
    assert_close(outputs(twin), expected, FLOAT32_MODEL)
    assert expected_ranks in (None, ranks(twin))
    assert {v.name for v in twin.trainable_variables} == {"lora_kernel_a", "lora_kernel_b"}
    said = capsys.readouterr().out
    assert "adapters of rank 2" in said and "exact" in said and said.count("\n") == 1
    # From here on it is an adapter like any other.
    klp.save_adapter(twin, tmp_path / "again.safetensors")
    again = klp.load_adapter(filled(make), tmp_path / "again.safetensors")
    assert_close(outputs(again), expected, FLOAT32_MODEL)
    klp.merge_lora_plus(twin)
    assert_close(outputs(twin), expected, FLOAT32_MODEL)


def test_nothing_is_said_where_the_rank_stays(tmp_path, capsys):
    path = tmp_path / "x.lora.h5"
    expected, _ = saved(bert, path, ["attention_output"])
    twin = klp.load_adapter(filled(bert), path)
    assert_close(outputs(twin), expected, FLOAT32_MODEL)
    assert capsys.readouterr().out == ""


def test_a_task_keeps_its_head(tmp_path):
    path = tmp_path / "x.lora.h5"
    expected, _ = saved(bert, path)
    backbone = filled(bert)
    task = keras_hub.models.BertTextClassifier(backbone, num_classes=2, preprocessor=None)
    klp.load_adapter(task, path)
    assert_close(outputs(backbone), expected, FLOAT32_MODEL)
    names = {v.path.split("/")[0] for v in task.trainable_variables if "lora" not in v.name}
    assert names == {"logits"}
    with pytest.raises(ValueError, match="compile"):
        task.fit(tokens(backbone), np.zeros(3), verbose=0)


def test_an_adapted_backbone_of_fitting_ranks(tmp_path):
    path = tmp_path / "x.lora.h5"
    expected, _ = saved(bert, path, ["query", "attention_output"])
    twin = filled(bert)
    klp.enable_lora_plus(
        twin, rank=2, targets=["query", "attention_output"], rank_pattern={"query": 6}
    )
    klp.load_adapter(twin, path)
    assert_close(outputs(twin), expected, FLOAT32_MODEL)


def test_an_adapted_backbone_with_room_for_more(tmp_path):
    """Of `max_rank`: what stands beyond the rank of the file is zero."""
    path = tmp_path / "x.lora.h5"
    expected, _ = saved(bert, path)
    twin = filled(bert)
    klp.enable_lora_plus(twin, rank=6, max_rank=9)
    klp.load_adapter(twin, path)
    assert_close(outputs(twin), expected, FLOAT32_MODEL)
    widths = {v.shape[-1] for v in twin.trainable_variables if v.name == "lora_kernel_a"}
    assert widths == {9}


@pytest.mark.parametrize(
    "settings, faults",
    [
        ({"rank": 2}, ["rank: .*query needs 6 and has 2", "rank: .*value needs 6 and has 2"]),
        ({"rank": 6, "alpha": 3}, ["scale: .*query needs 1 and has 0.5"]),
        ({"rank": 6, "targets": ["query", "key"]}, ["missing: .*key", "unexpected: .*value"]),
    ],
)
def test_adapters_that_do_not_fit_are_named(settings, faults, tmp_path):
    path = tmp_path / "x.lora.h5"
    written(filled(bert), path)
    twin = filled(bert)
    klp.enable_lora_plus(twin, **settings)
    assert_refused(twin, path, faults)


def assert_refused(model, path, faults):
    classes = [type(layer) for layer in model._flatten_layers()]
    flags = [v.trainable for v in model.weights]
    before = snapshot(model.weights)
    with pytest.raises(ValueError) as error:
        klp.load_adapter(model, path)
    for fault in faults:
        error.match(fault)
    assert [type(layer) for layer in model._flatten_layers()] == classes
    assert [v.trainable for v in model.weights] == flags
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)


def edited(change):
    def edit(path):
        with h5py.File(path, "r+") as file:
            change(file["lora"])

    return edit


def other_shapes(group):
    first = sorted(set(group) - {"vars"})[0]
    del group[first]["vars"]["lora_kernel_b"]
    group[first]["vars"]["lora_kernel_b"] = np.ones((2, 9), "float32")


def not_finite(group):
    first = sorted(set(group) - {"vars"})[0]
    group[first]["vars"]["lora_kernel_b"][0, 0] = np.nan


def moved(to):
    def move(group):
        group.move(sorted(set(group) - {"vars"})[0], to)

    return edited(move)


def without_rank(group):
    del group["vars"]["rank"]


def without_b(group):
    del group[sorted(set(group) - {"vars"})[0]]["vars"]["lora_kernel_b"]


def emptied(group):
    for index in set(group) - {"vars"}:
        del group[index]


def cut(path):
    with open(path, "r+b") as file:
        file.truncate(900)


def text(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    "spoil, fault",
    [
        (edited(other_shapes), r"shapes \(12, 3, 2\) and \(2, 9\) in the file"),
        (edited(not_finite), "its factors are not finite"),
        (moved("999"), "layer 999: the backbone has .* layers with weights"),
        (moved("0"), "layer 0, 'token_embedding': KerasHub saves no adapters of embeddings"),
        (moved("3"), "layer 3, .*: LayerNormalization is not a layer type"),
        (moved("5"), "layer 5, .*: its factors have shapes"),
        (moved("x"), "not a whole file of KerasHub's"),
        (edited(without_rank), "not a whole file of KerasHub's"),
        (edited(without_b), "not a whole file of KerasHub's"),
        (edited(emptied), "holds no adapters"),
        (cut, "not a whole file of KerasHub's"),
        (text, "not a whole file of KerasHub's"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(spoil, fault, tmp_path):
    path = tmp_path / "x.lora.h5"
    written(filled(bert), path)
    spoil(path)
    assert_refused(filled(bert), path, [fault])


def test_another_architecture_and_other_models(tmp_path):
    path = tmp_path / "x.lora.h5"
    written(filled(bert), path)
    assert_refused(filled(gemma), path, ["does not fit the backbone"])
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    assert_refused(plain, path, ["fits a KerasHub backbone or task"])
    native = filled(bert)
    native.enable_lora(2)
    assert_refused(native, path, ["Keras's own LoRA is enabled on it"])
    with pytest.raises(FileNotFoundError, match="no file"):
        klp.load_adapter(filled(bert), tmp_path / "none.lora.h5")


def test_a_file_of_a_bfloat16_backbone(tmp_path):
    """Stored as bfloat16 on JAX and TensorFlow, as float32 on torch; the values are the same."""
    path = tmp_path / "x.lora.h5"
    native = written(filled(bert, dtype="bfloat16"), path, ["attention_output"])
    twin = klp.load_adapter(filled(bert), path)
    theirs = [la for la in native._flatten_layers() if getattr(la, "lora_enabled", False)]
    ours = [la for la in twin._flatten_layers() if klp.layers.is_adapted(la)]
    for layer, other in zip(ours, theirs, strict=True):
        a = keras.ops.convert_to_numpy(keras.ops.cast(other.lora_kernel_a, "float32"))
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer.lora_kernel_a), a)
        assert layer.lora_kernel_a.dtype == "float32" and np.abs(a).min() > 0
