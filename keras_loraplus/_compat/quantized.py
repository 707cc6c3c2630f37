"""Quantized layers: Keras 3.15, and the strategies of 3.16's nightly builds."""


def quantized_mode_call(layer_class, mode):
    """Returns the unbound function that computes a Keras layer in a quantized mode.

    3.15.1 has a method for each mode; 3.16.0.dev2026102704 asks a strategy, by the layer's own
    mode. Neither is public.
    """
    method = getattr(layer_class, f"_{mode}_call", None)
    return _strategy(mode).call if method is None else method


def _strategy(mode):
    """Returns Keras's strategy of a quantized mode, or None in a Keras that has none."""
    try:
        from keras.src.quantizers import strategy_registry
    except ImportError:
        return None
    return strategy_registry.get_strategy(mode)


def quantized_view(layer, name):
    """Returns Keras's view of a quantized matrix, or None where Keras has no such views.

    3.16.0.dev2026102704 (`keras.src.quantizers.quantized_weight`): the view has the `shape` of the
    matrix, and `dequantize(dtype)`. In 3.15.1 a mode's layout is to be known.

    Args:
        layer: A quantized layer.
        name: Attribute of the matrix in the layer that is not quantized.
    """
    strategy = _strategy(layer.quantization_mode)
    if strategy is None:
        return None
    if name == "reverse_embeddings":
        return strategy.quantized_weights(layer)[1]
    return strategy.quantized_weight(layer)


def is_calibrated(layer):
    """Whether a layer of mode GPTQ or AWQ stores its matrix in that mode already.

    3.15.1 has a flag for each mode, 3.16.0.dev2026102704 one for what is still to come.
    """
    if hasattr(layer, "calibration_pending"):
        return not layer.calibration_pending
    return bool(getattr(layer, f"is_{layer.quantization_mode}_calibrated", False))
