"""What merging into quantized matrices costs, and where it cannot be done."""

from keras_loraplus import _compat
from keras_loraplus.layers import is_adapted
from keras_loraplus.layers.requantize import requantized, why_not_requantizable
from keras_loraplus.messages import note
from keras_loraplus.planning import layer_path


def requantization_errors(model):
    """Tells what `merge_lora_plus` would lose by quantizing merged kernels again.

    Args:
        model: A model with adapters, or any part of one; it is not changed.

    Returns:
        List of `RequantizationError`, one for each quantized matrix with an adapter: the norm of
        the rounding error over that of the merged matrix, and over that of `s A B`.

    Raises:
        ValueError: If a matrix cannot be quantized again (GPTQ, AWQ).

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(8), dense(2)])
        >>> model.layers[0].quantize("int8")
        >>> report = klp.enable_lora_plus(model, rank=2)
        >>> [error.mode for error in klp.requantization_errors(model)]
        ['int8']

    Source: Dettmers et al., "QLoRA", arXiv 2305.14314, whose adapters stay beside the kernel.
    """
    errors: list = []
    for layer in _compat.flatten_layers(model):
        if is_adapted(layer) and layer.quantization_mode is not None:
            check_requantizable(layer)
            errors += requantized(layer, layer.merged_values())[1]
    return errors


def check_requantizable(layer):
    """Raises if a quantized layer's merged matrix cannot be quantized again."""
    reason = why_not_requantizable(layer)
    if reason:
        raise ValueError(
            f"Layer '{layer_path(layer)}' cannot be quantized again with its adapter merged: "
            f"{reason}. Merge into float layers: `merge_lora_plus(model, dequantize=True)`."
        )


def say_errors(model, errors):
    """Says what re-quantizing has cost, once for the model."""
    if not errors:
        return
    worst = max(errors, key=lambda error: error.of_adapter)
    note(
        f"Merged into {len(errors)} quantized matrices of '{model.name}': rounding moved them by "
        f"up to {max(error.of_matrix for error in errors):.1%} of their norm, at most "
        f"{worst.of_adapter:.1%} of the adapter's own ({worst.path}, {worst.mode}). "
        "`merge_lora_plus(model, dequantize=True)` loses nothing."
    )
