"""Llama and Gemma on a 2 x 4 mesh: layouts, losses, and no whole copy of a sharded kernel."""

import json

import keras
import pytest
from optimizer_cases import run_python
from tolerances import ONE_DEVICE_LOSS, assert_close

if keras.backend.backend() != "jax":
    pytest.skip("keras.distribution.ModelParallel is on JAX only", allow_module_level=True)

pytestmark = pytest.mark.devices

NAMES = ["llama", "gemma"]

# Layouts of the kernel (from KerasHub's own map), of A and of B, by the end of the layer's path.
_PROJECTION = {
    "llama": (["model", "batch", None], ["model", None], [None, "batch", None]),
    # Gemma's kernels are (heads, inputs, head size).
    "gemma": (["model", "batch", None], ["batch", None], [None, "model", None]),
}
_WIDE = (["batch", "model"], ["batch", None], [None, "model"])
_NARROW = (["model", "batch"], ["model", None], [None, "batch"])
_OUTPUT = (["model", None, "batch"], ["model", None, None], [None, "batch"])
LAYOUTS = {
    "llama": {
        **{f"self_attention/{name}": _PROJECTION["llama"] for name in ("query", "key", "value")},
        "attention_output": _OUTPUT,
        "feedforward_intermediate_dense": _WIDE,
        "feedforward_gate_dense": _WIDE,
        "feedforward_output_dense": _NARROW,
        "token_embedding": _NARROW,
    },
    "gemma": {
        **{f"attention/{name}": _PROJECTION["gemma"] for name in ("query", "key", "value")},
        "attention_output": _OUTPUT,
        "ffw_gating": _WIDE,
        "ffw_gating_2": _WIDE,
        "ffw_linear": _NARROW,
        "token_embedding": _NARROW,
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sharded"))
    printed = run_python(f"import sharded_runs; sharded_runs.main({folder!r})")
    (line,) = [line for line in printed.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.parametrize("name", NAMES)
def test_layouts_of_every_kernel_and_its_factors(name, runs):
    run = runs[name]
    assert len(run["kernels"]) == len(LAYOUTS[name])
    assert len(run["factors"]) == 2 * len(LAYOUTS[name])
    for layer, (kernel, a, b) in LAYOUTS[name].items():
        kind = "embeddings" if layer == "token_embedding" else "kernel"
        assert ended(run["kernels"], f"{layer}/{kind}") == kernel, layer
        for side, axes in (("a", a), ("b", b)):
            assert ended(run["factors"], f"{layer}/lora_{kind}_{side}") == axes, (layer, side)
            flat = layer.replace("/", "_")
            for moment in ("momentum", "velocity"):
                end = f"{flat}_lora_{kind}_{side}_{moment}"
                assert ended(run["moments"], end) == axes, end


def ended(found, end):
    (value,) = [value for path, value in found.items() if path.endswith(end)]
    return value


@pytest.mark.parametrize("name", NAMES)
def test_losses_equal_those_of_one_device(name, runs):
    run = runs[name]
    assert run["right"][0] - run["right"][2] > 0.1
    assert_close(run["losses"], run["right"], ONE_DEVICE_LOSS)


@pytest.mark.parametrize("name", NAMES)
def test_no_device_and_no_host_holds_a_whole_kernel(name, runs):
    """At any point of enabling, training, saving and loading an adapter, and merging."""
    run = runs[name]
    for how in ("computes", "fetched", "put", "kept"):
        assert any(how in line for line in run["controls"]), how
    assert run["whole"] == []
