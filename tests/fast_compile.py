"""Lets XLA compile in half the time: imported for that before any backend is.

The tests' models are tiny and compiled often, so that what their machine code gains from being
optimised is for naught. The flags take no part in what XLA makes of a graph. They were chosen by
processor time (jax 0.10.2): the compatibility checks of a BERT take 22 s without them, 12 to 16 s
with the first two and 6 s with all. TensorFlow 2.21 knows them as well.
"""

import os
import pathlib

FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ.setdefault("XLA_FLAGS", FLAGS)

# The same graph comes up in many tests; JAX compiles it once and finds it here again.
_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
