"""Two JAX processes train one model: losses, checkpoints and adapter files."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import keras
import pytest
from optimizer_cases import run_python
from tolerances import EXACT, FUSED_20_STEPS, ONE_DEVICE_LOSS, assert_close

import keras_loraplus as klp
from keras_loraplus.adapters import files

if keras.backend.backend() != "jax":
    pytest.skip("jax.distributed is JAX's", allow_module_level=True)

pytestmark = pytest.mark.devices

NAMES = ["data", "model"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start(rank):
        code = (
            "import jax; jax.config.update('jax_num_cpu_devices', 2)\n"
            f"import jax_process_runs; jax_process_runs.main({rank}, {port}, {str(folder)!r})"
        )
        printed = run_python(code)
        (line,) = [line for line in printed.splitlines() if line.startswith("RESULT")]
        return json.loads(line.removeprefix("RESULT"))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(start, range(2))), folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    import jax_process_runs

    return jax_process_runs.right(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", NAMES)
def test_losses_equal_those_of_one_device(name, two_processes, one_process):
    (first, second), _ = two_processes
    losses = one_process[0]
    assert losses[0] - losses[-1] > 1e-2
    for found in (first[name], second[name]):
        assert_close(found["losses"], losses, ONE_DEVICE_LOSS)
    assert first[name]["here"] == ([[4, 8]] * 2 if name == "model" else [[8, 8]] * 2)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_process_writes_and_both_resume(name, two_processes):
    (first, second), folder = two_processes
    assert first[name]["writes"] == ["run.safetensors"] * 3
    assert second[name]["writes"] == []
    resumed = {"epoch": 1, "batch": 0}
    assert first[name]["resumed"] == second[name]["resumed"] == resumed
    assert not [path for path in (folder / name).iterdir() if path.suffix == ".tmp"]


@pytest.mark.parametrize("name", NAMES)
def test_adapter_files_of_both_are_whole_and_equal(name, two_processes, one_process):
    (first, second), folder = two_processes
    _, samples, values = one_process
    # Read from both halves of the kernel.
    assert first[name]["samples"] == second[name]["samples"] == samples
    one, other = (files.read(folder / name / f"adapter-{rank}.safetensors") for rank in range(2))
    assert set(one.tensors) == set(other.tensors) and one.base == other.base
    for key, value in one.tensors.items():
        assert_close(value, other.tensors[key], EXACT)
    import jax_process_runs

    model = jax_process_runs.model_of(3)
    klp.load_adapter(model, folder / name / "adapter-0.safetensors")
    for variable, value in zip(model.trainable_variables, values, strict=True):
        assert_close(keras.ops.convert_to_numpy(variable), value, 10 * FUSED_20_STEPS)
