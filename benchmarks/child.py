"""Measures one thing in a fresh process and writes it as JSON.

python -m benchmarks.child memory CASE ARM
python -m benchmarks.child first_step CASE ARM
python -m benchmarks.child large|large_resident [tiny]
python -m benchmarks.child profile CASE
"""

import json
import sys
import time

import keras

from benchmarks import large, profiling, resident
from benchmarks.cases import CASES
from benchmarks.worker import use_dtype

WARM_UP, COUNTED = 2, 3


def memory(case, arm):
    """Returns the bytes that a step needs in all, and beyond the model as it was built.

    On JAX they are those of XLA's buffers: arguments, outputs that reuse no argument, and
    temporaries. Elsewhere they are the peak of the resident set over three steps after two that
    compile, or on a GPU the peak that the backend's allocator reports.
    """
    step = CASES[case]()[arm]()
    if keras.backend.backend() == "jax":
        return _buffers(step)
    on_gpu = _gpu_memory()
    if on_gpu is not None:
        reset, now, peak = on_gpu
        method = "allocator"
    else:
        reset, now, peak = resident.reset_peak, resident.settled, resident.peak
        method = "resident"
    built = now()
    for _ in range(WARM_UP):
        step()
    reset()
    for _ in range(COUNTED):
        step()
    total = peak()
    return {"total": total, "extra": total - built, "method": method}


def _buffers(step):
    step()
    found = step.compiled_on_jax().memory_analysis()
    total = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )
    weights = sum(variable.value.nbytes for variable in step.model.weights)
    return {"total": total, "extra": total - weights, "method": "buffers"}


def _gpu_memory():
    """Returns (reset, now, peak) of the backend's allocator, or None without a GPU."""
    if keras.backend.backend() == "torch":
        import torch

        if not torch.cuda.is_available():
            return None
        return (
            torch.cuda.reset_peak_memory_stats,
            torch.cuda.memory_allocated,
            torch.cuda.max_memory_allocated,
        )
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        return None
    info = tf.config.experimental.get_memory_info
    return (
        lambda: tf.config.experimental.reset_memory_stats("GPU:0"),
        lambda: info("GPU:0")["current"],
        lambda: info("GPU:0")["peak"],
    )


def first_step(case, arm):
    """Returns the seconds of the first step, tracing and compilation included."""
    step = CASES[case]()[arm]()
    _start_compiler()
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    start = time.perf_counter()
    step()
    return {"first": first, "second": time.perf_counter() - start}


def _start_compiler():
    """Compiles something small, so that no arm pays for starting the compiler."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    data = keras.ops.ones((2, 2))
    model.train_on_batch(data, data)


KINDS = {
    "memory": memory,
    "first_step": first_step,
    "large": large.enable_and_merge,
    "large_resident": large.enable_and_merge,
    "profile": profiling.operations,
}
# Of these the resident set is measured, and no time.
RESIDENT = ("memory", "large_resident")


def main(kind, *arguments):
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be an answer
    use_dtype()
    if kind in RESIDENT:
        resident.follow_what_lives()
    print(json.dumps(KINDS[kind](*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
