"""KerasHub's banks of experts: every expert has an A and a B of its own."""

import importlib

import keras
import numpy as np
import pytest
from factored import formed
from hub_backbones import CASES, CHECKS, Flat, Run, adapted_layers, make
from keras import ops
from lora_cases import as_float64, factors, randomize
from tolerances import FLOAT32_LAYER, assert_close, relative_error

import keras_loraplus as klp
from keras_loraplus import _compat
from keras_loraplus.layers import MatrixAdapter, experts, merging

EXPERTS, WIDTH, HIDDEN, TOKENS = 3, 5, 7, 11
each = pytest.mark.parametrize("name", list(experts.ADAPTERS))


def imported(full_name):
    module, _, name = full_name.rpartition(".")
    return getattr(importlib.import_module(module), name)


def bank(name):
    """Returns a built bank of KerasHub's with weights that are not zero."""
    layer = imported(_compat.HUB_EXPERTS[name])(
        num_experts=EXPERTS, hidden_dim=WIDTH, intermediate_dim=HIDDEN, name="experts"
    )
    layer.build((None, WIDTH))
    randomize(layer.weights, seed=3)
    return layer


def adapted_bank(name, **settings):
    layer = experts.ADAPTERS[name].from_layer(bank(name), rank=2, alpha=3, **settings)
    randomize(factors(layer))
    return layer


def tokens(dtype="float32"):
    return np.random.default_rng(1).normal(size=(TOKENS, WIDTH)).astype(dtype)


def to_numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def silu(x):
    return x / (1 + np.exp(-x))


def formula(name, layer, x):
    """The outputs in float64, expert by expert, with W + s A B in the place of every W."""
    weights = {v.name: as_float64(v) for v in layer.weights}
    scale = layer.adapter.scale

    def matrix(matrix_name, expert):
        a = weights[f"lora_kernel_{matrix_name}_a"][expert]
        b = weights[f"lora_kernel_{matrix_name}_b"][expert]
        return weights[matrix_name][expert] + scale * a @ b

    outputs = []
    for expert in range(EXPERTS):
        if name == "GptOssExperts":
            both = x @ matrix("gate_up_proj", expert) + weights["gate_up_proj_bias"][expert]
            gate = np.minimum(both[:, ::2], layer.limit)
            up = np.clip(both[:, 1::2], -layer.limit, layer.limit)
            hidden = (up + 1) * gate / (1 + np.exp(-layer.alpha * gate))
            out = hidden @ matrix("down_proj", expert) + weights["down_proj_bias"][expert]
        else:
            first = x @ matrix("expert_feedforward_gate_dense", expert)
            if name == "MixtralMoeExperts":
                gate, up = first, x @ matrix("expert_feedforward_intermediate_dense", expert)
            else:
                gate, up = first[:, :HIDDEN], first[:, HIDDEN:]
            out = (silu(gate) * up) @ matrix("expert_feedforward_output_dense", expert)
        outputs.append(out)
    return np.stack(outputs)


@each
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_enabling_changes_no_bit(name, policy):
    keras.config.set_dtype_policy(policy)
    layer, x = bank(name), ops.cast(tokens(), layer_dtype(policy))
    before = to_numpy(layer(x))
    experts.ADAPTERS[name].from_layer(layer, rank=2)
    after = layer(x)
    assert keras.backend.standardize_dtype(after.dtype) == layer_dtype(policy)
    np.testing.assert_array_equal(to_numpy(after), before)
    assert {v.dtype for v in factors(layer)} == {"float32"}


def layer_dtype(policy):
    return policy.removeprefix("mixed_")


@each
def test_outputs_are_those_of_the_formula_and_of_the_merged_bank(name):
    plain, layer, x = bank(name), adapted_bank(name), tokens()
    before, actual = to_numpy(plain(x)), to_numpy(layer(x))
    assert relative_error(actual, before) > 1e-2
    assert_close(actual, formula(name, layer, x.astype("float64")), FLOAT32_LAYER)
    for attribute, value in layer.merged_values().items():
        getattr(plain, attribute).assign(value)
    assert_close(actual, to_numpy(plain(x)), FLOAT32_LAYER)


def test_merging_in_blocks_is_by_expert(monkeypatch):
    layer = adapted_bank("QwenMoeExperts")
    whole = {name: to_numpy(value) for name, value in layer.merged_values().items()}
    monkeypatch.setattr(merging, "BLOCK", 30)
    for name, value in layer.merged_values().items():
        assert len(merging._row_blocks(getattr(layer, name))) == EXPERTS
        np.testing.assert_array_equal(to_numpy(value), whole[name])


@each
def test_every_expert_has_factors_of_its_own(name):
    layer = adapted_bank(name)
    for pair in layer._factors():
        experts_, inputs, outputs = getattr(layer, pair.kernel).shape
        assert tuple(getattr(layer, pair.a).shape) == (experts_, inputs, 2)
        assert tuple(getattr(layer, pair.b).shape) == (experts_, 2, outputs)
    before = to_numpy(layer(tokens()))
    b = getattr(layer, layer._factors()[0].b)
    b.assign(to_numpy(b) * np.array([1.0, 0.0, 1.0])[:, None, None])
    after = to_numpy(layer(tokens()))
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert relative_error(after[1], before[1]) > 1e-3


@each
def test_nothing_of_a_bank_s_size_is_formed(name):
    layer = adapted_bank(name)
    x = ops.convert_to_tensor(tokens())
    for pair in layer._factors():
        size = int(np.prod(getattr(layer, pair.kernel).shape))
        assert formed(lambda: ops.sum(ops.square(layer(x))), factors(layer), size) == []
    size = int(np.prod(factors(layer)[0].shape))
    assert formed(lambda: ops.sum(ops.square(layer(x))), factors(layer), size)


def test_dropout():
    layer = adapted_bank("QwenMoeExperts", dropout=0.5)
    still = to_numpy(layer(tokens(), training=False))
    np.testing.assert_array_equal(to_numpy(layer(tokens())), still)
    assert relative_error(to_numpy(layer(tokens(), training=True)), still) > 1e-2


@each
def test_a_bank_of_another_version_is_refused(name, monkeypatch):
    """Its adapter would compute what this version's bank did."""
    layer = bank(name)
    plain_class = type(layer)
    assert klp.layers.why_not_adoptable(layer) is None
    call = plain_class.call
    for other in (
        lambda self, x: 2 * call(self, x),
        lambda self, x: call(self, x) + self.another_weight,
        lambda self, x: call(self, x)[0],
    ):
        experts._computes_alike.cache_clear()
        monkeypatch.setattr(plain_class, "call", other)
        assert "was written for keras-hub 0.32" in klp.layers.why_not_adoptable(layer)
    experts._computes_alike.cache_clear()


@pytest.mark.parametrize("full_name", [*_compat.HUB_EXPERTS.values(), *_compat.HUB_NOT_ADAPTABLE])
def test_classes_that_are_registered_by_name_exist(full_name):
    layer_class = imported(full_name)
    assert issubclass(layer_class, keras.layers.Layer)
    found = klp.layers.adapter_types.type_of(layer_class)
    assert found.layer_class == full_name
    assert (found.adapter is None) == (full_name in _compat.HUB_NOT_ADAPTABLE)


@pytest.mark.compatibility
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name",
    [f"{family}Backbone" for family in ("Mixtral", "QwenMoe", "Qwen3Moe", "Qwen3_5Moe", "GptOss")],
)
def test_backbones_with_their_experts_adapted(name):
    """The checks of the compatibility table, with targets that name the experts."""
    case = CASES[name]
    before = Flat(make(case)).predict_on_batch(case.inputs())
    run = Run(case, [".*(experts|query.*|linear_attn)"], before)
    for check in CHECKS:
        getattr(run, check.replace(" ", "_"))()
    assert any(isinstance(layer, MatrixAdapter) for layer in adapted_layers(run.twin))
