"""Convolutions of images whose channels come last, without torch's copies of them."""

import keras

from keras_loraplus._compat.torch_nodes import tensors


def convolution(inputs, kernel, data_format, **settings):
    """Returns `keras.ops.conv`, its values and gradients bit for bit.

    On torch Keras (3.15.1) copies the inputs of 2D and 3D convolutions into the memory order of
    channels first, then into that of channels last, in which torch (2.13.0) convolves. They are in
    this order from the start: as a view that has its channels first they are not copied.

    Args:
        inputs: Tensor (batch, *spatial, channels), or (batch, channels, *spatial).
        kernel: Tensor (*window, channels, filters).
        data_format: `"channels_last"` or `"channels_first"`.
        **settings: What else `keras.ops.conv` takes.
    """
    if (
        keras.backend.backend() != "torch"
        or isinstance(inputs, keras.KerasTensor)
        or data_format != "channels_last"
        or len(inputs.shape) not in (4, 5)
    ):
        return keras.ops.conv(inputs, kernel, data_format=data_format, **settings)
    import torch

    inputs, kernel = tensors((inputs, kernel))
    spatial = range(1, inputs.ndim - 1)
    order = torch.channels_last if len(spatial) == 2 else torch.channels_last_3d
    filters_first = kernel.permute(-1, -2, *(axis - 1 for axis in spatial))
    outputs = keras.ops.conv(
        inputs.contiguous().permute(0, -1, *spatial),
        filters_first.contiguous(memory_format=order).permute(
            *(axis + 1 for axis in spatial), 1, 0
        ),
        data_format="channels_first",
        **settings,
    )
    return outputs.permute(0, *(axis + 1 for axis in spatial), 1)
