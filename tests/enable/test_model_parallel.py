"""K07: under `ModelParallel` A and B are laid out as the kernel that they stand beside."""

import keras
import numpy as np
import pytest
from optimizer_cases import run_python
from tolerances import FLOAT32_MODEL, assert_close

if keras.backend.backend() != "jax":
    pytest.skip("keras.distribution.ModelParallel is on JAX only", allow_module_level=True)

MODEL = """
import keras
import keras_hub
import numpy as np

import keras_loraplus as klp


def make():
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.BertBackbone(
        24, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16, dropout=0.0
    )
    klp.enable_lora_plus(
        backbone, rank=3, max_rank=4, targets=["query", "attention_output", "token_embedding"]
    )
    head = keras.layers.Dense(3, name="head")
    model = keras.Model(backbone.input, head(backbone.output["pooled_output"]))
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if "lora_scaling" not in variable.path and "float" in str(variable.dtype):
            variable.assign(rng.normal(size=variable.shape).astype("float32") * 0.3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(klp.LoRAPlusAdamW(1e-2, weight_decay=0.1), loss)
    return model


def data():
    rng = np.random.default_rng(1)
    inputs = {
        "token_ids": rng.integers(1, 24, size=(8, 5)),
        "segment_ids": np.zeros((8, 5), "int32"),
        "padding_mask": np.ones((8, 5), "int32"),
    }
    return inputs, rng.integers(0, 3, size=8)


def trained(model):
    inputs, labels = data()
    losses = [model.fit(inputs, labels, verbose=0, shuffle=False).history["loss"] for _ in range(4)]
    return np.array(losses), model.predict(inputs, verbose=0)
"""

DISTRIBUTED = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import json, keras
devices = keras.distribution.list_devices("cpu")
assert len(devices) == 4
mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
layouts = keras.distribution.LayoutMap(mesh)
for rule, axes in RULES.items():
    layouts[rule] = axes
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
)
"""

REPORT = """
model = make()
shardings = {
    v.path: [None if axis is None else str(axis) for axis in v._layout.axes]
    for v in model.weights if "lora" in v.path or "query/kernel" in v.path
}
pieces = {
    v.path: list(v.value.addressable_shards[0].data.shape)
    for v in model.weights if "lora" in v.path
}
losses, outputs = trained(model)
slots = {
    v.path: [None if axis is None else str(axis) for axis in v._layout.axes]
    for v in model.optimizer.variables if "lora_kernel_a" in v.path
}
np.savez(OUT, losses=losses, outputs=outputs)
print("RESULT" + json.dumps([shardings, pieces, slots]))
"""

LOOSE = {
    ".*query.*kernel.*": (None, "model", None),
    ".*attention_output.*kernel.*": ("model", None, None),
    ".*token_embedding/.*embeddings.*": ("model", None),
}


def run(rules, out):
    import json

    printed = run_python(f"OUT = {str(out)!r}\nRULES = {rules!r}\n{DISTRIBUTED}{MODEL}{REPORT}")
    (line,) = [line for line in printed.splitlines() if line.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


def by_end(found, end):
    (value,) = [value for path, value in found.items() if path.endswith(end)]
    return value


def test_factors_are_laid_out_as_their_kernel(tmp_path):
    shardings, pieces, slots = run(LOOSE, tmp_path / "out.npz")
    assert by_end(shardings, "query/kernel") == [None, "model", None]
    assert by_end(shardings, "query/lora_kernel_a") == [None, None]
    assert by_end(shardings, "query/lora_kernel_b") == [None, "model", None]
    assert by_end(shardings, "query/lora_scaling") == []
    assert by_end(shardings, "attention_output/lora_kernel_a") == ["model", None, None]
    assert by_end(shardings, "attention_output/lora_kernel_b") == [None, None]
    assert by_end(shardings, "token_embedding/lora_embeddings_a") == ["model", None]
    assert by_end(pieces, "query/lora_kernel_b") == [4, 1, 4]
    assert by_end(pieces, "attention_output/lora_kernel_a") == [1, 4, 4]
    assert by_end(pieces, "token_embedding/lora_embeddings_a") == [12, 4]
    for path, axes in slots.items():
        if "attention_output" in path:
            assert axes == ["model", None, None], path

    scope: dict = {}
    exec(MODEL, scope)
    losses, outputs = scope["trained"](scope["make"]())
    assert losses[0] - losses[-1] > 1e-2
    with np.load(tmp_path / "out.npz") as found:
        assert_close(found["losses"], losses, FLOAT32_MODEL)
        assert_close(found["outputs"], outputs, FLOAT32_MODEL)


def test_a_rule_of_its_own_comes_first(tmp_path):
    rules = {**LOOSE, ".*query/lora_kernel_a": ("model", None)}
    shardings, _, _ = run(rules, tmp_path / "out.npz")
    assert by_end(shardings, "query/lora_kernel_a") == ["model", None]
    assert by_end(shardings, "query/lora_kernel_b") == [None, "model", None]
