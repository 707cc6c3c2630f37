"""A layer whose kernel is read past its call is not adapted but reported."""

import keras
import pytest
from keras import ops

import keras_loraplus as klp
from keras_loraplus.bypass import direct_reads


class Gated(keras.layers.Layer):
    """Calls one inner layer, reads the kernel of another, asks a third for a fact."""

    def build(self, input_shape):
        width = input_shape[-1]
        self.called = keras.layers.Dense(width, name="called")
        self.read = keras.layers.Dense(width, name="read")
        self.asked = keras.layers.Dense(width, name="asked")
        for layer in (self.called, self.read, self.asked):
            layer.build(input_shape)
        self.start = ops.convert_to_numpy(self.called.kernel).mean()  # not a forward pass

    def call(self, inputs):
        gate = ops.matmul(inputs, self.read.kernel)
        return self.called(inputs) * gate + self.asked(inputs) * self.asked.kernel.shape[0]

    def compute_output_shape(self, input_shape):
        return input_shape


def gated_model():
    return keras.Sequential([keras.Input((4,)), Gated(), keras.layers.Dense(2)])


def test_only_reads_of_values_in_a_forward_pass_count():
    assert direct_reads(Gated) == {"read"}
    assert direct_reads(keras.layers.MultiHeadAttention) == frozenset()


def test_it_is_reported_and_frozen():
    model = gated_model()
    report = klp.enable_lora_plus(model, rank=2)
    assert sorted(layer.path.split("/")[-1] for layer in report.adapted) == ["asked", "called"]
    ((path, reason),) = report.skipped
    assert (
        path.endswith("read") and "Gated reads its kernel directly (`self.read.kernel`)" in reason
    )
    assert not model.layers[0].read.kernel.trainable
    assert reason in str(report)


def test_asking_for_it_by_name_is_an_error():
    model = gated_model()
    with pytest.raises(
        ValueError, match="matched only layers that cannot be adapted: \\['read'\\]"
    ):
        klp.enable_lora_plus(model, rank=2, targets=["read", "called"])
    assert all(type(layer) is keras.layers.Dense for layer in (model.layers[1],))
    assert len(model.trainable_variables) == 8


def test_the_block_of_kerashub_that_does_so_is_known():
    from keras_hub.src.models.gemma4.gemma4_decoder_block import Gemma4TextDecoderBlock

    assert {"gating_ffw", "gating_ffw_2", "ffw_linear"} <= direct_reads(Gemma4TextDecoderBlock)
