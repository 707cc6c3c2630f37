"""torch: a layer's convolution copies no inputs, as Keras's does."""

import keras
import pytest

import keras_loraplus as kl

if keras.backend.backend() != "torch":
    pytest.skip("Keras copies the inputs on torch alone", allow_module_level=True)

from torch.profiler import ProfilerActivity, profile  # noqa: E402


@pytest.mark.parametrize("dimensions", [2, 3])
def test_torch_copies_no_inputs(dimensions):
    """The control is the layer of Keras, which copies them twice."""
    names = f"Conv{dimensions}D", f"LoRAPlusConv{dimensions}D"
    plain = getattr(keras.layers, names[0])(6, 3, padding="same")
    adapted = getattr(kl.layers, names[1])(6, 3, padding="same", rank=2)
    inputs = keras.ops.ones((2, *(7,) * dimensions, 5))

    def copies(layer):
        layer(inputs)  # builds it
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            layer(inputs)
        copied = [
            event.input_shapes[0] for event in recorded.events() if event.name == "aten::copy_"
        ]
        return copied.count([2, 5, *(7,) * dimensions])

    assert copies(plain) == 2
    assert copies(adapted) == 0
