"""The recipe for several processes, run as a user runs it."""

import re

import keras
import pytest

import keras_loraplus as klp

if keras.backend.backend() != "torch":
    pytest.skip("DistributedDataParallel is torch's", allow_module_level=True)

pytestmark = pytest.mark.devices


def test_two_processes_train(run_example, tmp_path):
    done = run_example("torch_ddp.py", "--output", tmp_path, "--epochs", 2)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"epoch (\d+), 2 processes: loss ([\d.]+)", done.stdout)
    assert [epoch for epoch, _ in found] == ["1", "2"]
    assert float(found[1][1]) < float(found[0][1])
    assert klp.inspect_adapter(tmp_path / "adapter.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter.safetensors",
        "run.safetensors",
    ]


def test_a_batch_that_cannot_be_shared(run_example, tmp_path):
    done = run_example("torch_ddp.py", "--output", tmp_path, "--processes", 3)
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "the batch of 32 cannot be shared equally by 3 (--help lists the options)"
    )
