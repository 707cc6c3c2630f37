"""A safetensors file with a seal: the SHA-256 of its own header stands in its metadata.

A safetensors file is the length of the header (8 bytes, little-endian), the header (JSON: name,
dtype, shape and place of every tensor, and a dict of texts), and the bytes of the tensors. The seal
makes a damaged header known before any of it is believed; damage to the tensors is for the caller's
digests to find. Any safetensors library can read such a file.
"""

import hashlib
import json
import math
import re

import numpy as np

_SEAL = "sha256"
_OPEN_SEAL = "0" * 64
_SEAL_PATTERN = re.compile(rb'"sha256":"([0-9a-f]{64})"')

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
_NAMES = {value: key for key, value in DTYPES.items()}


def encoded(tensors, metadata):
    """Yields the bytes of the file, piece by piece; tensors are not copied.

    Args:
        tensors: Dict from key to numpy array.
        metadata: Dict of texts.

    Raises:
        ValueError: If the format has no name for a dtype.
    """
    # Wider types first, as the safetensors library does, so that each tensor is aligned.
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    values = {key: little_endian(tensors[key]) for key in order}
    header: dict = {"__metadata__": {_SEAL: _OPEN_SEAL, **metadata}}
    start = 0
    for key, value in values.items():
        if value.dtype.str not in _NAMES:
            raise ValueError(f"Adapter files have no dtype {value.dtype}, as '{key}' has.")
        header[key] = {
            "dtype": _NAMES[value.dtype.str],
            "shape": list(value.shape),
            "data_offsets": [start, start + value.nbytes],
        }
        start += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    seal = hashlib.sha256(text).hexdigest()
    yield len(text).to_bytes(8, "little")
    yield text.replace(_OPEN_SEAL.encode(), seal.encode(), 1)
    for value in values.values():
        yield as_bytes(value)


def decoded(data):
    """Returns the tensors, views of `data`, and the metadata.

    Nothing is allocated that the file only claims to hold.

    Args:
        data: The whole file, as bytes.

    Returns:
        Tuple of dicts `(tensors, metadata)`.

    Raises:
        ValueError: With a short text, if it is not a whole safetensors file with a seal.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 10 or size > len(data) - 8:
        raise ValueError("it is cut off, or no safetensors file at all")
    text = data[8 : 8 + size]
    seal = _SEAL_PATTERN.search(text)
    if seal is None:
        raise ValueError(f"it has no seal{_seen(text)}")
    start, end = seal.span(1)
    opened = text[:start] + _OPEN_SEAL.encode() + text[end:]
    if hashlib.sha256(opened).hexdigest().encode() != seal[1]:
        raise ValueError("its header is not what was written")
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        tensors = _views(header, memoryview(data)[8 + size :])
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"its header does not describe tensors: {error!r}") from error
    return tensors, metadata


def as_bytes(value):
    """Returns the bytes of a contiguous array without a copy."""
    return memoryview(value.reshape(-1).view(np.uint8))


def little_endian(value):
    """Returns an array as the file stores it; the array itself where it is so already."""
    return np.asarray(value, value.dtype.newbyteorder("<"), order="C")


def _views(header, payload):
    tensors, reached = {}, 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, (start, end) = np.dtype(DTYPES[entry["dtype"]]), entry["data_offsets"]
        shape = tuple(int(axis) for axis in entry["shape"])
        count = math.prod(shape)
        fits = min(shape, default=0) >= 0 and count * dtype.itemsize == end - start
        if start != reached or not fits:
            raise ValueError(f"the place of tensor '{key}' does not fit its shape")
        reached = end
        if reached > len(payload):
            break
        tensors[key] = np.frombuffer(payload[start:end], dtype).reshape(shape)
    if reached != len(payload):
        raise ValueError(
            f"its tensors need {reached:,} bytes and it holds {len(payload):,}: it is cut off, or "
            "something was appended"
        )
    return tensors


def _seen(text):
    """Tells a file of another program, whose header is whole, from a damaged one."""
    try:
        metadata = json.loads(text).get("__metadata__", {})
        return f" and was written by another program (metadata: {sorted(metadata)})"
    except (ValueError, AttributeError, TypeError, RecursionError):
        return ""
