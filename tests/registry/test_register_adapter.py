"""The table of adapters: what may be entered, what counts for a class, and what the report says."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from lora_cases import all_factors, randomize_factors
from registry_layers import INPUTS, Bank, BankAdapter, Gated, GatedAdapter, data, model_with

import keras_loraplus as klp
from keras_loraplus import layers as kl


class NoCall(kl.MatrixAdapter):
    equations = {"gate": "bi,ij->bj"}


class NoEquations(kl.MatrixAdapter):
    def call(self, inputs, training=None):
        return inputs


class BadEquation(NoEquations):
    equations = {"gate": "bi,ij"}


class NotThin(NoEquations):
    equations = {"gate": "bi,i->bi"}


class Bare(kl.LowRankLayer):
    """Has nothing of what it needs."""


def test_the_library_s_own_are_entered_and_the_nearest_base_counts():
    assert kl.lora_class_for(layers.Dense) is kl.LoRAPlusDense
    assert kl.lora_class_for(layers.Embedding) is kl.LoRAPlusEmbedding
    # An `Embedding` as well.
    assert kl.lora_class_for(layers.ReversibleEmbedding) is kl.LoRAPlusReversibleEmbedding
    assert kl.lora_class_for(type("Mine", (layers.Conv2D,), {})) is kl.LoRAPlusConv2D
    assert kl.lora_class_for(layers.Dropout) is None
    kinds = [kl.kind_of(c) for c in (layers.Dense, layers.Conv1D, layers.Embedding, layers.Dropout)]
    assert kinds == ["linear", "convolution", "other", None]


def test_the_exact_class_wins_over_its_base():
    class Special(Gated):
        pass

    class SpecialAdapter(GatedAdapter):
        pass

    klp.register_adapter(Gated, GatedAdapter)
    assert issubclass(kl.lora_class_for(Special), GatedAdapter)
    klp.register_adapter(Special, SpecialAdapter)
    assert issubclass(kl.lora_class_for(Special), SpecialAdapter)
    assert not issubclass(kl.lora_class_for(Gated), SpecialAdapter)
    klp.unregister_adapter(Special)
    klp.register_adapter(Special, reason="it is special")
    assert kl.lora_class_for(Special) is None


def test_one_adapter_for_two_classes_of_layers():
    class Other(Gated):
        def call(self, inputs):
            return super().call(inputs)

    klp.register_adapter(Gated, GatedAdapter)
    klp.register_adapter(Other, GatedAdapter)
    first, second = kl.lora_class_for(Gated), kl.lora_class_for(Other)
    assert (first.plain_class, second.plain_class) == (Gated, Other)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((Gated, NoCall), "needs a `call`"),
        ((Gated, NoEquations), "`equations` must name the matrices"),
        ((Gated, BadEquation), "must have the form"),
        ((Gated, NotThin), "needs a contracted and a free kernel axis"),
        ((Gated, Bare), "it has no '_factors' and no '_plan_factors' and no 'call'"),
        ((Gated, layers.Dense), "must be a subclass of `keras_loraplus.layers.MatrixAdapter`"),
        ((Gated, GatedAdapter()), "must be a subclass"),
        ((Gated, kl.LoRAPlusDense), "is the adapter of Dense"),
        ((kl.LoRAPlusDense, kl.LoRAPlusDense), "has an adapter already"),
        ((Gated(), GatedAdapter), "must be a subclass of `keras.layers.Layer`, or the full name"),
        (("Gated", GatedAdapter), "or the full name"),
        ((dict, GatedAdapter), "must be a subclass of `keras.layers.Layer`"),
        ((layers.Dense, kl.LoRAPlusDense), "is registered already, with LoRAPlusDense"),
        (("keras.src.layers.core.dense.Dense", kl.LoRAPlusDense), "is the adapter of Dense"),
    ],
)
def test_refusals_change_nothing(arguments, message, table):
    before = dict(table)
    with pytest.raises(ValueError, match=message):
        klp.register_adapter(*arguments)
    assert table == before


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"adapter": GatedAdapter, "kind": "dense"}, "`kind` must be one of"),
        ({"adapter": GatedAdapter, "reason": "none"}, "not both"),
        ({"reason": " "}, "must be a text"),
        ({"reason": 3}, "must be a text"),
    ],
)
def test_refused_settings(settings, message, table):
    before = dict(table)
    with pytest.raises(ValueError, match=message):
        klp.register_adapter(Gated, **settings)
    assert table == before


def test_overwriting_is_said_and_unregistering_restores(table):
    before = dict(table)
    klp.register_adapter(Gated, GatedAdapter)
    with pytest.raises(ValueError, match="registered already, with GatedAdapter.*overwrite=True"):
        klp.register_adapter(Gated, reason="not today")
    assert issubclass(kl.lora_class_for(Gated), GatedAdapter)
    klp.register_adapter(Gated, reason="not today", overwrite=True)
    assert kl.lora_class_for(Gated) is None
    with pytest.raises(ValueError, match="registered already, with no adapter"):
        klp.register_adapter(Gated, GatedAdapter)
    klp.unregister_adapter(Gated)
    assert table == before
    with pytest.raises(ValueError, match="Nothing is registered for .*Gated"):
        klp.unregister_adapter(Gated)


def test_a_class_that_is_not_imported_is_registered_by_name():
    name = f"{Gated.__module__}.Gated"
    klp.register_adapter(name, GatedAdapter)
    assert issubclass(kl.lora_class_for(Gated), GatedAdapter)
    with pytest.raises(ValueError, match="registered already"):
        klp.register_adapter(Gated, GatedAdapter)
    klp.unregister_adapter(Gated)
    assert kl.lora_class_for(Gated) is None


def test_as_a_decorator():
    @klp.register_adapter(Bank, kind="linear")
    class Mine(BankAdapter):
        pass

    assert issubclass(kl.lora_class_for(Bank), Mine)
    assert kl.kind_of(Bank) == "linear"


def adapted(report):
    return [layer.path.split("/")[-1] for layer in report.adapted]


def between():
    hidden = [keras.Input((INPUTS,)), layers.Dense(INPUTS, name="first"), Bank(name="own")]
    return keras.Sequential([*hidden, layers.Dense(2, name="head")])


@pytest.mark.parametrize(
    "kind, by_default, all_linear",
    [
        ("other", ["first", "own"], ["first"]),
        ("linear", ["first", "own"], ["first", "own"]),
        ("convolution", ["first", "own"], ["first"]),
        ("named", ["first"], ["first"]),
    ],
)
def test_which_targets_mean_a_kind(kind, by_default, all_linear):
    klp.register_adapter(Bank, BankAdapter, kind=kind)
    assert adapted(klp.enable_lora_plus(between(), rank=2)) == by_default
    report = klp.enable_lora_plus(between(), rank=2, targets="all-linear")
    assert adapted(report) == all_linear
    assert adapted(klp.enable_lora_plus(between(), rank=2, targets=["own"])) == ["own"]
    if kind == "named":
        ((path, reason),) = report.skipped
        assert path.endswith("own")
        assert reason.startswith("Bank is adapted only where `targets` name it; it holds")
        assert "kernels (2, 5, 3)" in reason


def test_a_reason_is_in_the_report():
    klp.register_adapter(Bank, reason="it has had enough")
    report = klp.enable_lora_plus(between(), rank=2)
    ((_, reason),) = report.skipped
    assert reason.startswith("no adapter exists for a Bank: it has had enough; it holds its")
    with pytest.raises(ValueError, match="it has had enough"):
        klp.enable_lora_plus(between(), rank=2, targets=["own", "first"])


def test_the_reason_of_a_recurrent_cell():
    model = keras.Sequential(
        [keras.Input((3, INPUTS)), layers.GRU(4), layers.Dense(4), layers.Dense(2)]
    )
    report = klp.enable_lora_plus(model, rank=2)
    ((_, reason),) = report.skipped
    assert "its kernels are read step by step inside of a recurrence" in reason


def test_kernels_of_adapted_layers_cannot_be_kept_trainable():
    klp.register_adapter(Gated, GatedAdapter)
    model = model_with(Gated(name="own"))
    with pytest.raises(ValueError, match="fullmatches no variable path"):
        klp.enable_lora_plus(model, rank=2, trainable=".*own/gate")
    klp.enable_lora_plus(model, rank=2, trainable=".*own/offset")
    assert "offset" in [v.name for v in model.get_layer("own").trainable_variables]


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda layer: setattr(layer, "down", None), "has no weight in `down`"),
        (lambda layer: setattr(layer, "down", layer.offset), "expects one of the axes 'jo'"),
        (
            lambda layer: setattr(layer.gate, "constraint", keras.constraints.NonNeg()),
            "the constraint of `gate`",
        ),
        (lambda layer: setattr(layer.offset, "_name", "gate"), r"several weights of one name"),
    ],
)
def test_a_layer_that_does_not_fit_its_adapter_is_refused(change, reason):
    klp.register_adapter(Gated, GatedAdapter)
    model = model_with(Gated(name="own"))
    change(model.get_layer("own"))
    assert reason.replace("\\", "") in kl.why_not_adoptable(model.get_layer("own"))
    with pytest.raises(ValueError, match=reason):
        klp.enable_lora_plus(model, rank=2, targets=["own"])
    assert type(model.get_layer("own")) is Gated


def test_from_layer_and_what_was_adapted_before_unregistering():
    klp.register_adapter(Gated, GatedAdapter)
    model = model_with(Gated(name="own"))
    layer = model.get_layer("own")
    assert GatedAdapter.from_layer(layer, rank=2) is layer
    randomize_factors(model)
    outputs = ops.convert_to_numpy(model(data()))
    klp.unregister_adapter(Gated)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(data())), outputs)
    assert len(all_factors(model)) == 6
    with pytest.raises(ValueError, match="expects a built layer of the class that it is"):
        GatedAdapter.from_layer(layers.Dense(2), rank=2)


def test_loading_without_the_adapter_says_what_to_do(tmp_path):
    klp.register_adapter(Gated, GatedAdapter)
    model = model_with(Gated(name="own"))
    klp.enable_lora_plus(model, rank=2)
    model.save(tmp_path / "model.keras")
    klp.unregister_adapter(Gated)
    with pytest.raises(ValueError, match="the adapter was not found.*register_adapter"):
        keras.saving.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize(
    "name, role",
    [
        ("lora_kernel_up_proj_a", "lora_a"),
        ("lora_kernel_up_proj_b", "lora_b"),
        ("lora_embeddings_table_b", "embedding_b"),
        ("lora_kernel_up_proj_c", "other"),
        ("lora_kernel_b_head", "other"),
        ("my_lora_kernel_up_a", "other"),
        ("lora_up_a", "other"),
    ],
)
def test_roles_of_the_factors_of_named_matrices(name, role):
    from keras_loraplus.optimizers.multipliers import role_of

    assert role_of(f"model/layer/{name}") == role
    assert role_of(f"{name}/kernel") == "other"
