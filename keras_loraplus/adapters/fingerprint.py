"""Tells whether an adapter stands on the base it was trained on, from a few numbers a layer."""

import base64

import numpy as np
from keras import ops

from keras_loraplus import _compat

# Together some two hundred numbers a matrix, which is 400 bytes of a file.
SLICES, ENTRIES = 8, 25

# How far samples may differ: float16, which they are kept in, and the base's own dtype.
_TOLERANCE = {"float32": 2e-3, "float64": 2e-3, "float16": 4e-3, "bfloat16": 2e-2}


def fingerprint(kernel):
    """Returns shape, dtype and some samples of a frozen matrix, as JSON values.

    Eight slices of 25 entries are read, spread over every axis, each from the devices that hold it:
    a kernel that is spread over devices is never gathered.

    Args:
        kernel: A variable.

    Returns:
        Dict with `shape`, `dtype` and `samples` (float16, base64).
    """
    with np.errstate(over="ignore"):  # float16 ends at 65504; what is beyond is not compared
        samples = _samples(kernel).astype("float16")
    return {
        "shape": list(kernel.shape),
        "dtype": str(kernel.dtype),
        "samples": base64.b64encode(samples.tobytes()).decode(),
    }


def comparable(kernel, saved):
    """Whether both matrices are of floating point: quantized values have another meaning.

    Args:
        kernel: A variable.
        saved: What `fingerprint` returned.
    """
    return str(kernel.dtype) in _TOLERANCE and saved["dtype"] in _TOLERANCE


def differs(kernel, saved):
    """Tells whether a matrix is another one than a fingerprint was taken of.

    Args:
        kernel: A variable of floating point.
        saved: What `fingerprint` returned, likewise of floating point.

    Returns:
        A short text, or None.
    """
    if list(kernel.shape) != saved["shape"]:
        return f"shape {tuple(kernel.shape)}, was {tuple(saved['shape'])}"
    then = np.frombuffer(base64.b64decode(saved["samples"]), "float16").astype("float32")
    now = _samples(kernel)
    both_finite = np.isfinite(then) & np.isfinite(now)
    if not both_finite.any():
        return None
    then, now = then[both_finite], now[both_finite]
    scale = max(float(np.abs(then).max()), 1e-6)
    tolerance = max(_TOLERANCE[str(kernel.dtype)], _TOLERANCE[saved["dtype"]])
    if float(np.abs(now - then).max()) > scale * tolerance:
        return "other values"
    return None


def slices(shape):
    """Returns where the samples of a matrix are read (pure).

    Args:
        shape: The matrix's shape.

    Returns:
        Tuple `(starts, size)`: a start for each slice, and the one shape that all slices have, so
        that a backend that compiles compiles once.

    Example:
        >>> starts, size = slices((100, 40))
        >>> size, starts[0], starts[-1]
        ((1, 25), (0, 0), (99, 15))
    """
    size: list[int] = []
    left = ENTRIES
    for axis in reversed(shape):
        size.insert(0, min(axis, left))
        left = max(1, left // size[0])
    room = [axis - taken for axis, taken in zip(shape, size, strict=True)]
    starts = [
        tuple(_spread(step, axis) * free // (SLICES - 1) for axis, free in enumerate(room))
        for step in range(SLICES)
    ]
    return list(dict.fromkeys(starts)), tuple(size)


def _spread(step, axis):
    """Orders the steps of every axis differently, first and last apart: no mere diagonal."""
    inner = SLICES - 2
    if step in (0, SLICES - 1):
        return step
    return 1 + (step - 1) * (1, 5)[axis % 2] % inner


def _samples(kernel):
    starts, size = slices(tuple(kernel.shape))
    tensor = ops.convert_to_tensor(kernel)
    parts = _compat.parts_of(tensor)
    samples = np.concatenate([_read(parts, start, size).reshape(-1) for start in starts])
    return _compat.known_anywhere(tensor, samples)


def _read(parts, start, size):
    """Returns one slice of a matrix of which every part lies on a device of its own.

    What is in none of the parts is NaN.
    """
    found = np.full(size, np.nan, "float32")
    for offset, part in parts:
        here = list(zip(start, size, offset, part.shape, strict=True))
        low = [max(begin, at) for begin, _, at, _ in here]
        high = [min(begin + taken, at + room) for begin, taken, at, room in here]
        if any(first >= last for first, last in zip(low, high, strict=True)):
            continue
        length = [last - first for first, last in zip(low, high, strict=True)]
        value = ops.slice(part, [first - at for first, at in zip(low, offset, strict=True)], length)
        inside = tuple(
            slice(first - begin, last - begin)
            for first, last, begin in zip(low, high, start, strict=True)
        )
        found[inside] = ops.convert_to_numpy(ops.cast(value, "float32"))
    return found
