"""The adapter file: one safetensors file whose every byte is accounted for.

Beside the tensors the file holds one JSON text, its description, and the SHA-256 of that text. The
description holds a SHA-256 of every tensor, dtype and shape included. So a file is either what was
written, or it is refused.
"""

import dataclasses
import hashlib
import json
import os
import secrets
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

FORMAT = "keras_loraplus"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    Attributes:
        adapters: Dict from layer path to the settings of its adapter.
        base: Dict from path of a frozen matrix to its `fingerprint`.
        library_version: Version of keras_loraplus that wrote the file.
        tensors: Dict from key to numpy array.
    """

    adapters: dict
    base: dict
    library_version: str
    tensors: dict


def write(path, content):
    """Writes an `AdapterFile` whole or not at all.

    It goes to a temporary file in the same folder, is flushed to the disk, and is renamed.

    Args:
        path: Where to write.
        content: The `AdapterFile`.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If a tensor has no entries.
    """
    empty = sorted(key for key, value in content.tensors.items() if not value.size)
    if empty:
        raise ValueError(f"An adapter file holds no tensors without entries. Received: {empty}.")
    description = json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "library_version": content.library_version,
            "adapters": content.adapters,
            "base": content.base,
            "tensors": {key: _digest(value) for key, value in content.tensors.items()},
        },
        sort_keys=True,
    )
    metadata = {
        "format": FORMAT,
        "description": description,
        "sha256": hashlib.sha256(description.encode()).hexdigest(),
    }
    _write_atomically(path, safetensors.numpy.save(content.tensors, metadata))


def read(path):
    """Reads an adapter file and checks every byte of it.

    Args:
        path: A file that `write` wrote.

    Returns:
        The `AdapterFile`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, cut off, of another format or of another version.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no adapter file '{path}'.")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged header can fail in any way
        raise ValueError(
            f"'{path}' is not a whole safetensors file: {error}. It may have been cut off or "
            "damaged while it was copied, or be a pointer to the real file; fetch it again."
        ) from error
    description = _described(path, metadata)
    damaged = sorted(
        key
        for key in {*tensors, *description["tensors"]}
        if key not in tensors or description["tensors"].get(key) != _digest(tensors[key])
    )
    empty = sorted(key for key, value in tensors.items() if not value.size)
    if damaged or empty:
        raise ValueError(
            f"'{path}' is damaged: tensors that are not what was written: {damaged}; tensors "
            f"without entries: {empty}. Fetch the file again."
        )
    return AdapterFile(
        adapters=description["adapters"],
        base=description["base"],
        library_version=description["library_version"],
        tensors=tensors,
    )


def _described(path, metadata) -> dict[str, Any]:
    text = metadata.get("description")
    if metadata.get("format") != FORMAT or text is None:
        raise ValueError(
            f"'{path}' is a safetensors file but not one of `keras_loraplus.save_adapter`. "
            f"Metadata found: {sorted(metadata)}."
        )
    if metadata.get("sha256") != hashlib.sha256(text.encode()).hexdigest():
        raise ValueError(
            f"'{path}' is damaged: its description is not what was written. Fetch the file again."
        )
    description = json.loads(text)
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"'{path}' has adapter format version {description['format_version']}; this version of "
            f"keras_loraplus reads {FORMAT_VERSION}. Install the one that wrote it: keras_loraplus "
            f"{description['library_version']}."
        )
    return description


def _digest(value):
    head = f"{value.dtype.str}{value.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).hexdigest()


def _write_atomically(path, data):
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"The folder of '{path}' does not exist: '{folder}'. Make it first."
        )
    # Not `tempfile`, whose files only their owner may read: an adapter is a file like any other.
    temporary = os.path.join(folder, f".adapter-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
