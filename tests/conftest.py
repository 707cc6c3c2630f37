"""One process a backend: `KERAS_BACKEND=jax pytest`; unset, Keras's own choice stands."""

import gc
import os

BACKENDS = ("tensorflow", "jax", "torch")

if os.environ.get("KERAS_BACKEND", BACKENDS[0]) not in BACKENDS:
    raise RuntimeError(
        f"KERAS_BACKEND={os.environ['KERAS_BACKEND']!r} is not one of {BACKENDS}; "
        "run for example `KERAS_BACKEND=jax pytest`."
    )
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The models here are tiny and the workers fill the cores: a thread pool in each makes all slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")

import fast_compile  # noqa: E402, F401
import keras  # noqa: E402
import pytest  # noqa: E402

SEED = 1234


def pytest_report_header():
    return f"keras {keras.__version__}, backend {keras.backend.backend()}"


def pytest_collection_finish():
    """Leaves what was imported out of later garbage collections.

    Keras's `quantize` collects once a layer, and what the backends import makes each take half a
    second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_keras():
    """Same seed, same automatic layer names and float32 for every test, in any order."""
    keras.utils.clear_session(free_memory=False)
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(SEED)
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def backend():
    return keras.backend.backend()
