"""Two gloo processes with half a batch each train as one process with the whole batch."""

import json
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from optimizer_cases import run_python
from tolerances import FLOAT32, FUSED_20_STEPS, assert_close

if keras.backend.backend() != "torch":
    pytest.skip("DistributedDataParallel is torch's", allow_module_level=True)

pytestmark = pytest.mark.devices


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    rendezvous = (tmp_path_factory.mktemp("meet") / "store").as_uri()

    def start(rank):
        code = (
            "import pathlib, sys, ddp_runs\n"
            "sys.path.append(str(pathlib.Path(ddp_runs.__file__).parents[1] / 'examples'))\n"
            f"ddp_runs.main({rank}, {rendezvous!r}, {str(folder)!r})"
        )
        printed = run_python(code)
        (line,) = [line for line in printed.splitlines() if line.startswith("RESULT")]
        return json.loads(line.removeprefix("RESULT"))

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(start, range(2)))
    states = []
    for rank in range(2):
        with np.load(folder / f"{rank}.npz") as arrays:
            states.append([arrays[f"arr_{number}"] for number in range(len(arrays.files))])
    return results, states


def test_they_equal_one_process_with_the_whole_batch(two_processes):
    import ddp_runs

    import torch_ddp

    results, states = two_processes
    model = ddp_runs.model_of(0)
    start = ddp_runs.state(model)
    x, y = ddp_runs.data()
    losses = []
    for epoch in range(ddp_runs.EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(x))
        batches = order.reshape(-1, torch_ddp.GLOBAL_BATCH)
        losses.append(np.mean([model.train_on_batch(x[batch], y[batch]) for batch in batches]))
    right = ddp_runs.state(model)
    for result, values in zip(results, states, strict=True):
        assert_close(result["losses"], losses, 10 * FLOAT32)
        for value, expected in zip(values, right, strict=True):
            assert_close(value, expected, 10 * FUSED_20_STEPS)
    count = len(model.weights)
    moved = [np.any(a != b) for a, b in zip(start[:count], right[:count], strict=True)]
    assert sum(moved) == len(model.trainable_variables)


def test_both_processes_hold_the_same_bits(two_processes):
    _, (one, other) = two_processes
    assert len(one) == len(other)
    for value, expected in zip(one, other, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_only_what_trains_is_in_the_buckets(two_processes):
    results, _ = two_processes
    for result in results:
        # One bucket a step, with A, B and the head, and nothing else.
        assert len(result["buckets hold what trains"]) > 1
        assert all(result["buckets hold what trains"])
        assert result["frozen gradients"] and not any(result["frozen gradients"])


def test_the_first_process_writes_and_both_resume(two_processes):
    (first, second), _ = two_processes
    assert first["writes"] == [1, 2, 3]
    assert second["writes"] == []
    assert first["resumed"] == second["resumed"] == {"epoch": 1, "batch": 0}
    # No temporary file of a second writer is left either.
    assert "run.safetensors" in first["files"]
    assert not [name for name in first["files"] if name.endswith(".tmp")]
