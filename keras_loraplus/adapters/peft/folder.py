"""The tensors of a PEFT folder: `adapter_model.safetensors`."""

import pathlib

import numpy as np
import safetensors
from safetensors.numpy import save

from keras_loraplus.adapters.atomic import write_atomically

ROOT = "base_model.model."
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
}
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def write_folder(folder, tensors, config_text):
    """Writes the tensors and then the configuration, each whole or not at all."""
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # PEFT reads the format from the metadata.
    data = save({ROOT + key: value for key, value in tensors.items()}, {"format": "pt"})
    write_atomically(path / "adapter_model.safetensors", data)
    write_atomically(path / "adapter_config.json", config_text.encode())


def bias_key(module):
    """Returns the key of the bias of a module that has an adapter, which wraps it."""
    return f"{module}.base_layer.bias"


def without_wrapper(key):
    """Returns a key as it is in a model without adapters."""
    return key.replace(".base_layer.", ".")


def factor_keys(module, is_embedding):
    """Returns the keys of A and B of a module."""
    if is_embedding:
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def read_folder(folder):
    """Reads the tensors of a PEFT folder.

    Returns:
        Tuple ({module: {"a": A, "b": B}}, {key: value of every other tensor}); float32, without
        PEFT's own prefix.

    Raises:
        FileNotFoundError: If there is no safetensors file.
        ValueError: If it is damaged, or holds tensors of an unknown kind.
    """
    path = pathlib.Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        older = " (adapter_model.bin is not read: it can run code; save it again with PEFT)"
        found = (path.parent / "adapter_model.bin").is_file()
        raise FileNotFoundError(f"There is no file '{path}'{older if found else ''}.")
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except Exception as error:  # the format's own error class, whatever is damaged
        raise ValueError(f"'{path}' is not a whole safetensors file: {error}") from error
    factors: dict = {}
    others: dict = {}
    for key, entry in entries:
        name = key.removeprefix(ROOT)
        value = _value(path, key, entry)
        for ending, part in _PARTS.items():
            if name.endswith(ending):
                factors.setdefault(name.removesuffix(ending), {})[part] = value
                break
        else:
            others[name] = value
    return factors, others


def _value(path, key, entry):
    shape, data = tuple(entry["shape"]), entry["data"]
    if entry["dtype"] == "BF16":  # the upper half of a float32
        value = (np.frombuffer(data, "<u2").astype("uint32") << 16).view("float32")
    elif entry["dtype"] in _DTYPES:
        value = np.frombuffer(data, _DTYPES[entry["dtype"]]).astype("float32")
    else:
        raise ValueError(f"'{path}': '{key}' has dtype {entry['dtype']}, which is no float.")
    return value.reshape(shape)
