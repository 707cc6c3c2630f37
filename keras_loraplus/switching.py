"""Switches adapters off for a while, through values that traced functions read."""

import contextlib

import keras

from keras_loraplus import _compat
from keras_loraplus.layers import is_adapted


@contextlib.contextmanager
def adapters_disabled(model):
    """Gives the base model's outputs inside a `with` block, and comes back exactly.

        y = x W + 0 (x A) B

    The scale of every adapter is a variable, and is 0 inside the block. So `predict`, `evaluate`
    and `fit` that were traced before are right inside it, without tracing again. Whatever
    happens inside to A and B (a `fit` moves them by momentum and decay) is undone at its end;
    what else trains, a head say, keeps what it learned.

    Args:
        model: A model with adapters, or any part of one.

    Yields:
        The same model.

    Raises:
        ValueError: If the model has no adapters.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(8), dense(2)])
        >>> report = klp.enable_lora_plus(model, rank=2)
        >>> with klp.adapters_disabled(model):
        ...     base = model(keras.ops.ones((1, 4)))

    Source: the reference distance of preference optimisation, arXiv 2305.18290, needs it.
    """
    adapted = [layer for layer in _compat.flatten_layers(model) if is_adapted(layer)]
    if not adapted:
        raise ValueError(
            f"The model '{model.name}' has no LoRA+ adapters to disable. Enable them first: "
            "`keras_loraplus.enable_lora_plus(model)`."
        )
    variables = [
        variable
        for layer in adapted
        for variable in (layer.lora_scaling, *layer.adapter_variables().values())
    ]
    before = [keras.ops.copy(variable) for variable in variables]
    try:
        for layer in adapted:
            layer.lora_scaling.assign(0.0)
        yield model
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
