"""The adapter file: one safetensors file whose every byte is accounted for.

Beside the tensors the file holds one JSON text, its description, in a header that is sealed by its
own SHA-256 (`container`). The description holds a digest of every tensor: key, dtype, shape and
bytes. So a file is either what was written, or it is refused.

Imports neither keras nor a backend, so that a file can be read, and its writing be tested, without.
"""

import base64
import binascii
import dataclasses
import hashlib
import json
import os
from typing import Any

import numpy as np

from keras_loraplus.adapters import container
from keras_loraplus.adapters.atomic import write_atomically

FORMAT = "keras_loraplus"
FORMAT_VERSION = 2

# Bytes of SHA-256 that are kept of each tensor: 128 bits, far beyond what chance or wear can match.
_DIGEST = 16


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds.

    Attributes:
        adapters: Dict from layer path to the settings of its adapter.
        base: Dict from path of a frozen matrix to its `fingerprint`.
        library_version: Version of keras_loraplus that wrote the file.
        tensors: Dict from key to numpy array.
        targets: The `targets` that the model was enabled with, as JSON; None for the default.
        faults: What `read(..., strict=False)` found wrong with tensors, a text each.
    """

    adapters: dict
    base: dict
    library_version: str
    tensors: dict
    targets: Any = None
    faults: tuple = ()


def write(path, content):
    """Writes an `AdapterFile` whole or not at all.

    Args:
        path: Where to write.
        content: The `AdapterFile`.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If a tensor has no entries, or a dtype that the format does not know.
    """
    empty = sorted(key for key, value in content.tensors.items() if not value.size)
    if empty:
        raise ValueError(f"An adapter file holds no tensors without entries. Received: {empty}.")
    tensors = {key: np.asarray(value, order="C") for key, value in content.tensors.items()}
    write_atomically(path, container.encoded(tensors, _metadata(content)))


def read(path, *, strict=True):
    """Reads an adapter file and checks every byte of it.

    Args:
        path: A file that `write` wrote.
        strict: Whether damaged tensors and tensors without entries raise. If not, they are in
            `faults`, for an error that lists them with whatever else is wrong.

    Returns:
        The `AdapterFile`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, cut off, of another format or of another version.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no adapter file '{path}'.")
    with open(path, "rb") as file:
        data = file.read()
    try:
        tensors, metadata = container.decoded(data)
    except ValueError as error:
        raise ValueError(
            f"'{path}' is not a whole file of `keras_loraplus.save_adapter`: {error}. It may have "
            "been cut off or damaged while it was copied, or be a pointer to the real file; fetch "
            "it again."
        ) from error
    try:
        content = _content(path, tensors, metadata)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, binascii.Error) as error:
        raise ValueError(
            f"'{path}' is not an adapter file: its description lacks what one holds ({error!r})."
        ) from error
    if strict and content.faults:
        raise ValueError(f"'{path}' is damaged: {'; '.join(content.faults)}. Fetch the file again.")
    return content


def _metadata(content):
    description = {
        "format_version": FORMAT_VERSION,
        "library_version": content.library_version,
        "targets": content.targets,
        "adapters": _grouped(content.adapters),
        "base": _grouped(content.base, apart="samples"),
        "digests": _digests(content.tensors),
    }
    return {"format": FORMAT, "description": json.dumps(description, separators=(",", ":"))}


def _content(path, tensors, metadata):
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"'{path}' is a safetensors file but not one of `keras_loraplus.save_adapter`. "
            f"Metadata found: {sorted(metadata)}."
        )
    description = json.loads(metadata["description"])
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"'{path}' has adapter format version {description['format_version']}; this version of "
            f"keras_loraplus reads {FORMAT_VERSION}. Install the one that wrote it: keras_loraplus "
            f"{description['library_version']}."
        )
    empty = sorted(key for key, value in tensors.items() if not value.size)
    differing = _differing(tensors, description["digests"])
    faults = [f"without entries: {key}" for key in empty]
    faults += [f"not what was written: {key}" for key in differing if key not in empty]
    return AdapterFile(
        adapters=_by_path(description["adapters"]),
        base=_by_path(description["base"], apart="samples"),
        library_version=description["library_version"],
        tensors=tensors,
        targets=description["targets"],
        faults=tuple(faults),
    )


def _grouped(records, apart=None):
    """Returns records with equal settings once each, with the paths they are for.

    A model has hundreds of adapted layers and few settings: the header of a large adapter stays
    small.

    Args:
        records: Dict from path to dict.
        apart: Entry of each dict that is kept with its path.
    """
    groups: dict = {}
    for path, record in records.items():
        shared = {name: value for name, value in record.items() if name != apart}
        group = groups.setdefault(json.dumps(shared, sort_keys=True), {"shared": shared, "of": {}})
        group["of"][path] = record.get(apart) if apart else None
    return [
        {"shared": group["shared"], "of": group["of"] if apart else list(group["of"])}
        for group in groups.values()
    ]


def _by_path(groups, apart=None):
    records = {}
    for group in groups:
        for path in group["of"]:
            own = {apart: group["of"][path]} if apart else {}
            records[path] = {**group["shared"], **own}
    return records


def _digest(key, value):
    digest = hashlib.sha256(json.dumps([key, value.dtype.str, list(value.shape)]).encode())
    digest.update(value.tobytes())
    return digest.digest()[:_DIGEST]


def _digests(tensors):
    joined = b"".join(_digest(key, tensors[key]) for key in sorted(tensors))
    return base64.b64encode(joined).decode()


def _differing(tensors, digests):
    """Returns the keys whose tensors are not those that the digests were taken of."""
    joined = base64.b64decode(digests)
    keys = sorted(tensors)
    if len(joined) != _DIGEST * len(keys):
        return keys
    return [
        key
        for place, key in enumerate(keys)
        if joined[place * _DIGEST : (place + 1) * _DIGEST] != _digest(key, tensors[key])
    ]
