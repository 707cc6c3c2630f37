"""What cannot be adapted is listed in the report: weights held by hand, layers never called."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_loraplus as klp
from keras_loraplus.handwritten import own_matrices
from keras_loraplus.planning import make_plan


class Experts(layers.Layer):
    """Holds a bank of matrices itself, and tables that are no matrices to multiply by."""

    def build(self, input_shape):
        width = input_shape[-1]
        self.bank = self.add_weight(name="bank", shape=(3, width, width))
        self.position_table = self.add_weight(name="position_table", shape=(7, width))
        self.gate_bias = self.add_weight(name="gate_bias", shape=(3, width))
        self.scale = self.add_weight(name="scale", shape=(1, width))

    def call(self, inputs):
        return ops.einsum("bi,eij->bj", inputs * self.scale, self.bank)


def with_experts():
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="first"), Experts(name="experts"), layers.Dense(2)]
    )


def test_only_matrices_count():
    model = with_experts()
    assert own_matrices(model.get_layer("experts")) == {"bank": (3, 4, 4)}
    assert own_matrices(model.get_layer("first")) == {}


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_weights_held_by_hand_are_reported(targets):
    model = with_experts()
    report = klp.enable_lora_plus(model, rank=2, targets=targets)
    assert [layer.path.split("/")[-1] for layer in report.adapted] == ["first"]
    ((path, reason),) = report.skipped
    assert path.endswith("experts")
    assert "Experts is not a layer type that adapters exist for" in reason
    assert reason.endswith("it holds its weights itself: bank (3, 4, 4)")
    assert f"not adaptable: {path}: {reason}" in str(report)


def test_what_was_excluded_is_not_reported():
    model = with_experts()
    report = klp.enable_lora_plus(model, rank=2, exclude=["experts"])
    assert report.skipped == ()


def test_an_explicit_target_does_not_list_the_rest():
    assert klp.enable_lora_plus(with_experts(), rank=2, targets=["first"]).skipped == ()


def test_targets_that_mean_only_such_layers_are_refused():
    with pytest.raises(ValueError, match="matched only layers that cannot be adapted"):
        klp.enable_lora_plus(with_experts(), rank=2, targets=["experts", "first"])


class Keeper(layers.Layer):
    """Keeps a layer that it never builds, and calls another."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.used = layers.Dense(4, name="used")
        self.unused = layers.Dense(4, name="unused")

    def build(self, input_shape):
        self.used.build(input_shape)

    def call(self, inputs):
        return self.used(inputs)


def test_a_layer_that_a_block_never_calls_does_not_stop_the_others():
    model = keras.Sequential([keras.Input((4,)), Keeper(), layers.Dense(2)])
    functional = keras.Model(model.inputs, model.outputs)
    report = klp.enable_lora_plus(functional, rank=2)
    assert [layer.path.split("/")[-1] for layer in report.adapted] == ["used"]
    assert [reason for _, reason in report.skipped] == ["it is not built"]


@keras.saving.register_keras_serializable("tests")
class Around(keras.Model):
    """A functional model that takes the second layer of an encoder, and keeps the encoder."""

    def __init__(self, encoder, **kwargs):
        inputs = keras.Input((4,))
        super().__init__(inputs, encoder.layers[2](inputs), **kwargs)
        self.encoder = encoder


def test_a_layer_out_of_the_graph_is_reported():
    inputs = keras.Input((4,))
    hidden = layers.Dense(4, name="first")(inputs)
    encoder = keras.Model(inputs, layers.Dense(4, name="second")(hidden))
    model = Around(encoder)
    report = klp.enable_lora_plus(model, rank=2, targets=[".*(first|second)"])
    assert [layer.path.split("/")[-1] for layer in report.adapted] == ["second"]
    ((path, reason),) = report.skipped
    assert path.endswith("first")
    assert "does not call it, so that the outputs do not depend on it" in reason


class BeyondItsGraph(keras.Model):
    """A functional model whose `call` uses a layer that its graph does not hold."""

    def __init__(self):
        inputs = keras.Input((4,))
        super().__init__(inputs, layers.Dense(4, name="first")(inputs))
        self.second = layers.Dense(4, name="second")
        self.second.build((None, 4))

    def call(self, inputs, training=None, mask=None):
        return self.second(super().call(inputs, training=training, mask=mask))


def test_a_functional_model_with_its_own_call_may_use_every_layer():
    report = klp.enable_lora_plus(BeyondItsGraph(), rank=2, targets=["first", ".*second"])
    assert len(report.adapted) == 2
    assert report.skipped == ()


def test_the_graph_of_the_outer_model_counts_too():
    """A part that only a task calls is adapted through the task."""
    inputs = keras.Input((4,))
    first, second = layers.Dense(4, name="first"), layers.Dense(4, name="second")
    backbone = keras.Model(inputs, first(inputs), name="backbone")
    backbone.second = second
    backbone.default_lora_layer_names = lambda: ["first", "second"]
    task = keras.Model(inputs, second(backbone(inputs)), name="task")
    task.backbone = backbone
    x = np.ones((2, 4), "float32")
    before = ops.convert_to_numpy(task(x))
    arguments = {"rank": 2}
    plan = make_plan(backbone, None, (), (), arguments, None, None)
    assert [a.layer.name for a in plan.adaptations] == ["first"]
    assert len(plan.skipped) == 1
    report = klp.enable_lora_plus(task, rank=2, targets=["first", "second"])
    assert len(report.adapted) == 2
    np.testing.assert_array_equal(ops.convert_to_numpy(task(x)), before)
