"""A safetensors file with a seal: the SHA-256 of its own header stands in its metadata.

A safetensors file begins with the length of its header (8 bytes, little-endian) and the header, a
JSON text that says where every tensor is. The seal makes a damaged header known before any of it is
believed; damage to the tensors is for the caller's digests to find. Any safetensors library can
read such a file.
"""

import hashlib
import json
import re

import safetensors
import safetensors.numpy

_OPEN_SEAL = "0" * 64
_SEAL_PATTERN = re.compile(rb'"sha256":"([0-9a-f]{64})"')


def encoded(tensors, metadata):
    """Returns the bytes of the file.

    Args:
        tensors: Dict from key to contiguous numpy array.
        metadata: Dict of texts.

    Raises:
        ValueError: If the format has no name for a dtype.
    """
    try:
        data = safetensors.numpy.save(tensors, {"sha256": _OPEN_SEAL, **metadata})
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"A tensor cannot be kept in an adapter file: {error}.") from error
    header = _header(data)
    seal = hashlib.sha256(header).hexdigest()
    sealed = _SEAL_PATTERN.sub(f'"sha256":"{seal}"'.encode(), header, count=1)
    return data[:8] + sealed + data[8 + len(header) :]


def decoded(data):
    """Returns the tensors and the metadata.

    Args:
        data: The whole file, as bytes.

    Returns:
        Tuple of dicts `(tensors, metadata)`.

    Raises:
        ValueError: With a short text, if it is not a whole safetensors file with a seal.
    """
    header = _header(data)
    if len(header) < 2:
        raise ValueError("it is cut off, or no safetensors file at all")
    seal = _SEAL_PATTERN.search(header)
    if seal is None:
        raise ValueError(f"it has no seal{_seen(header)}")
    start, end = seal.span(1)
    opened = header[:start] + _OPEN_SEAL.encode() + header[end:]
    if hashlib.sha256(opened).hexdigest().encode() != seal[1]:
        raise ValueError("its header is not what was written")
    try:
        return safetensors.numpy.load(data), json.loads(header)["__metadata__"]
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"its tensors are not those of its header ({error})") from error


def _header(data):
    """Returns the bytes of the header, none if the file is shorter than it claims."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end] if end <= len(data) else b""


def _seen(text):
    """Tells a file of another program, whose header is whole, from a damaged one."""
    try:
        metadata = json.loads(text).get("__metadata__", {})
        return f" and was written by another program (metadata: {sorted(metadata)})"
    except (ValueError, AttributeError, TypeError, RecursionError):
        return ""
