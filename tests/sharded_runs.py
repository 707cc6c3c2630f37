"""Llama and Gemma backbones on a mesh of 2 x 4 virtual devices, for a process of its own.

`watched` notes whatever holds as much as a whole kernel on one device or on the host. Sizes are
chosen so that nothing else does: the smallest kernel has 2048 entries, and what a device sees of
the activations at most 1152.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import tempfile

import fast_compile

DUMP = tempfile.mkdtemp()
os.environ["XLA_FLAGS"] = f"{fast_compile.FLAGS} --xla_dump_to={DUMP} --xla_dump_hlo_as_text"

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

import keras  # noqa: E402
import keras_hub  # noqa: E402
import numpy as np  # noqa: E402
from jax._src import array as jax_array  # noqa: E402
from lora_cases import randomize, randomize_factors  # noqa: E402

import keras_loraplus as klp  # noqa: E402

BACKBONES = {
    "llama": lambda: keras_hub.models.LlamaBackbone(
        vocabulary_size=48,
        num_layers=1,
        num_query_heads=8,
        hidden_dim=64,
        intermediate_dim=96,
        num_key_value_heads=4,
        tie_word_embeddings=True,  # KerasHub's layout map leaves the untied table whole
    ),
    "gemma": lambda: keras_hub.models.GemmaBackbone(
        vocabulary_size=48,
        num_layers=1,
        num_query_heads=8,
        num_key_value_heads=4,
        hidden_dim=64,
        intermediate_dim=192,
        head_dim=8,
    ),
}
WHOLE = 2048
EVERYTHING = [".*(query|key|value|attention_output|dense|gating.*|linear|token_embedding)"]


def distribution(name):
    devices = keras.distribution.list_devices("cpu")
    assert len(devices) == 8
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
    layouts = type(BACKBONES[name]()).get_layout_map(mesh)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def made(name):
    """A backbone whose last token is classified, with non-zero weights."""
    keras.utils.set_random_seed(0)
    backbone = BACKBONES[name]()
    head = keras.layers.Dense(3, name="head")
    model = keras.Model(backbone.input, head(backbone.output[:, -1]))
    randomize(model.weights, seed=3, scale=0.2)
    return model, backbone


def enabled(backbone):
    klp.enable_lora_plus(backbone, rank=4, targets=EVERYTHING)
    randomize_factors(backbone)


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(klp.LoRAPlusAdamW(1e-3, weight_decay=0.1, global_clipnorm=1.0), loss)
    return model


def data():
    rng = np.random.default_rng(1)
    inputs = {
        "token_ids": rng.integers(1, 48, size=(16, 3)).astype("int32"),
        "padding_mask": np.ones((16, 3), "int32"),
    }
    return inputs, rng.integers(0, 3, size=16)


def fit(model, **kwargs):
    inputs, labels = data()
    return model.fit(
        inputs, labels, batch_size=8, epochs=3, shuffle=False, verbose=0, **kwargs
    ).history["loss"]


@contextlib.contextmanager
def watched(found, phase):
    """Appends to `found` what is as large as a kernel on one device, or is fetched to the host."""
    jax.clear_caches()  # so that what runs is compiled, and dumped, again
    before, alive = set(os.listdir(DUMP)), jax.live_arrays()
    fetch, put = jax_array.ArrayImpl._value, jax.device_put

    def noted(array, how):
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
            sizes = [shard.data.size for shard in array.addressable_shards]
            if array.size >= WHOLE and (how == "fetched" or max(sizes) >= WHOLE):
                found.append(f"{phase}: {how} {array.shape}")
        return array

    jax_array.ArrayImpl._value = property(
        lambda self: (noted(self, "fetched"), fetch.__get__(self))[1]
    )
    jax.device_put = lambda *args, **kwargs: noted(put(*args, **kwargs), "put")
    try:
        yield
    finally:
        jax_array.ArrayImpl._value, jax.device_put = fetch, put
    modules = sorted(set(os.listdir(DUMP)) - before)
    modules = [name for name in modules if name.endswith("after_optimizations.txt")]
    assert modules, phase
    for name in modules:
        text = (pathlib.Path(DUMP) / name).read_text()
        for shape in sorted(set(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))):
            if math.prod(map(int, shape.split(","))) >= WHOLE:
                found.append(f"{phase}: {name} computes [{shape}]")
    known = {id(array) for array in alive}
    for array in jax.live_arrays():
        if id(array) not in known:
            noted(array, "kept")


def axes(variables):
    return {
        v.path: [None if axis is None else str(axis) for axis in v.value.sharding.spec]
        + [None] * (len(v.shape) - len(v.value.sharding.spec))
        for v in variables
        if len(v.shape) > 1
    }


def check(name, folder):
    """Runs every phase on the mesh, and the same on one device; returns what was found."""
    folder = pathlib.Path(folder)
    model, backbone = made(name)
    enabled(backbone)
    right = fit(compiled(model))

    whole: list = []
    keras.distribution.set_distribution(distribution(name))
    model, backbone = made(name)
    kernels = {v.path: v for v in backbone.weights if len(v.shape) > 1}
    jax.clear_caches()
    controls: list = []
    with watched(controls, "control"):
        kernel = max(kernels.values(), key=lambda v: math.prod(v.shape)).value
        replicated = jax.sharding.NamedSharding(kernel.sharding.mesh, jax.sharding.PartitionSpec())
        jax.block_until_ready(jax.jit(lambda k: k + 1, out_shardings=replicated)(kernel))
        np.asarray(kernel)
        copy = jax.device_put(kernel, replicated)
    del copy
    with watched(whole, "enabling"):
        enabled(backbone)
        compiled(model)
    with watched(whole, "training"):
        losses = fit(
            model,
            callbacks=[klp.callbacks.AdapterCheckpoint(folder / f"{name}-run.safetensors")],
        )
    with watched(whole, "saving and loading"):
        klp.save_adapter(model, folder / f"{name}.safetensors")
        klp.load_adapter(model, folder / f"{name}.safetensors")
    moments = [v for v in model.optimizer.variables if "lora" in v.path]
    result = {
        "right": right,
        "losses": losses,
        "kernels": axes(kernels.values()),
        "factors": axes(v for v in model.trainable_variables if "lora" in v.path),
        "moments": axes(moments),
    }
    with watched(whole, "merging"):
        klp.merge_lora_plus(model)
    keras.distribution.set_distribution(None)
    return {**result, "whole": whole, "controls": controls}


def main(folder):
    print("RESULT" + json.dumps({name: check(name, folder) for name in BACKBONES}))
