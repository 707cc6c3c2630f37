"""Tells whether an adapter stands on the base it was trained on, from a few numbers a layer."""

import base64

import numpy as np
from keras import ops

ROWS, COLUMNS = 8, 25

# How far samples may differ: float16, which they are kept in, and the base's own dtype.
_TOLERANCE = {"float32": 2e-3, "float64": 2e-3, "float16": 4e-3, "bfloat16": 2e-2}


def fingerprint(kernel):
    """Returns shape, dtype and some samples of a frozen matrix, as JSON values.

    Eight rows are read one by one, and 25 entries of each, so that a kernel that is spread over
    devices is never gathered.

    Args:
        kernel: A variable.

    Returns:
        Dict with `shape`, `dtype` and `samples` (float16, base64).
    """
    samples = _samples(kernel).astype("float16")
    return {
        "shape": list(kernel.shape),
        "dtype": str(kernel.dtype),
        "samples": base64.b64encode(samples.tobytes()).decode(),
    }


def differs(kernel, saved):
    """Tells whether a matrix is another one than a fingerprint was taken of.

    Args:
        kernel: A variable.
        saved: What `fingerprint` returned.

    Returns:
        A short text, or None. A quantized matrix is not compared with a floating-point one.
    """
    if list(kernel.shape) != saved["shape"]:
        return f"shape {tuple(kernel.shape)}, was {tuple(saved['shape'])}"
    dtypes = (str(kernel.dtype), saved["dtype"])
    if any(dtype not in _TOLERANCE for dtype in dtypes):
        return None
    then = np.frombuffer(base64.b64decode(saved["samples"]), "float16").astype("float32")
    now = _samples(kernel)
    scale = max(float(np.abs(then).max()), 1e-6)
    if float(np.abs(now - then).max()) > scale * max(_TOLERANCE[dtype] for dtype in dtypes):
        return "other values"
    return None


def _samples(kernel):
    rows = np.unique(np.linspace(0, kernel.shape[0] - 1, ROWS).astype(int))
    tensor = ops.convert_to_tensor(kernel)
    taken = [
        ops.convert_to_numpy(ops.cast(ops.reshape(tensor[int(row)], (-1,))[:COLUMNS], "float32"))
        for row in rows
    ]
    return np.concatenate(taken)
