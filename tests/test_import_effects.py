"""Rule 12, O16: importing the package touches no device and no other backend."""

import os
import subprocess
import sys

import keras
import pytest

PACKAGES = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch"}
OPTIONAL = ["keras_hub", "keras_nlp", "peft", "transformers", "matplotlib", "optuna"]


def run(code, backend):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    # The test runner's own settings must not decide what a user's process sees.
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


def added_modules(backend):
    """Returns what `import keras_loraplus` imports beyond `import keras`."""
    return run(
        "import sys, keras\n"
        "before = set(sys.modules)\n"
        "import keras_loraplus\n"
        "print(*sorted(set(sys.modules) - before))",
        backend,
    )


def test_no_other_backend_and_no_optional_package():
    chosen = keras.backend.backend()
    added = {name.split(".")[0] for name in added_modules(chosen)}
    assert "keras_loraplus" in added
    # Keras itself imports tensorflow for some of its own needs on the other backends.
    unwanted = [*PACKAGES.values(), "jaxlib", *OPTIONAL]
    assert added.isdisjoint(unwanted), added & set(unwanted)


AFTER_IMPORT = {
    "tensorflow": """
import keras_loraplus, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
print(len(tf.config.list_logical_devices("CPU")))
""",
    "jax": """
import keras_loraplus, jax
jax.config.update("jax_num_cpu_devices", 2)
print(jax.device_count())
""",
    "torch": """
import keras_loraplus, torch
assert not torch.cuda.is_initialized()
torch.set_num_interop_threads(2)
print(torch.get_num_interop_threads())
""",
}


def test_devices_can_still_be_configured(backend):
    assert run(AFTER_IMPORT[backend], backend)[-1] == "2"


EARLY = {
    "tensorflow": "import tensorflow as tf; tf.zeros(1)",
    "jax": "import jax; jax.numpy.zeros(1)",
}


def test_the_check_can_fail(backend):
    """Once a device is in use, the same configuration is refused."""
    if backend == "torch":
        pytest.skip("a torch CPU has nothing that a first use would fix")
    code = EARLY[backend] + AFTER_IMPORT[backend]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode != 0


def test_importing_creates_no_variable():
    code = (
        "import keras\n"
        "created = []\n"
        "init = keras.Variable.__init__\n"
        "def counted(self, *args, **kwargs):\n"
        "    created.append(self)\n"
        "    init(self, *args, **kwargs)\n"
        "keras.Variable.__init__ = counted\n"
        "import keras_loraplus\n"
        "print(len(created))\n"
        "keras.Variable(1.0)\n"
        "print(len(created))"
    )
    assert run(code, keras.backend.backend()) == ["0", "1"]
