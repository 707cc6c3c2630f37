"""What each of two processes with two devices does in `training/test_jax_processes.py`."""

import json
import pathlib

import jax
import keras
from lora_cases import randomize_factors, snapshot
from tiny_models import compile_model, features, functional, labels

import keras_loraplus as klp
from keras_loraplus.adapters import files, fingerprint

ROWS, BATCH, EPOCHS = 16, 8, 3


def distribution(name):
    """ "model" puts one half of each kernel, and of the factors beside it, into each process."""
    devices = keras.distribution.list_devices("cpu")
    assert len(devices) == 4
    if name == "data":
        return keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    mesh = keras.distribution.DeviceMesh((2, 2), ("model", "batch"), devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*first.*kernel"] = (None, "model")
    layouts[".*second.*kernel"] = ("model", None)
    return keras.distribution.ModelParallel(
        layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
    )


class Batches(keras.utils.PyDataset):
    """The rows that the devices of this process compute on."""

    def __init__(self, rank=None):
        super().__init__()
        share = (
            slice(0, BATCH) if rank is None else slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        )
        self.parts = [
            tuple(array[start : start + BATCH][share] for array in (features(ROWS), labels(ROWS)))
            for start in range(0, ROWS, BATCH)
        ]

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, index):
        return self.parts[index]


def model_of(seed):
    keras.utils.set_random_seed(seed)
    model = functional()
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model, seed)
    compile_model(model, klp.LoRAPlusAdamW(1e-2, lr_ratio=4.0, global_clipnorm=0.05))
    return model


def fit(model, data, epochs, path):
    saved = klp.callbacks.AdapterCheckpoint(path)
    history = model.fit(data, epochs=epochs, shuffle=False, verbose=0, callbacks=[saved])
    return history.history["loss"], saved.resumed_from


def check(name, rank, folder):
    """Trains one epoch, then goes on to the last in a model that began elsewhere."""
    folder = pathlib.Path(folder) / name
    folder.mkdir(exist_ok=True)
    writes = []
    write = files.write
    files.write = lambda path, content: (
        writes.append(pathlib.Path(path).name),
        write(path, content),
    )
    keras.distribution.set_distribution(distribution(name))
    # In "model" the rows of a batch are shared inside of each process.
    data = Batches(rank if name == "data" else None)
    path = folder / "run.safetensors"
    losses, _ = fit(model_of(1), data, 1, path)
    model = model_of(2)
    more, resumed = fit(model, data, EPOCHS, path)
    files.write = write
    klp.save_adapter(model, folder / f"adapter-{rank}.safetensors")
    kernel = model.get_layer("second").kernel
    keras.distribution.set_distribution(None)
    return {
        "losses": [*losses, *more],
        "resumed": resumed,
        "writes": writes,
        "here": [list(shard.data.shape) for shard in kernel.value.addressable_shards],
        "samples": fingerprint.fingerprint(kernel)["samples"],
    }


def right(folder):
    """The same in one process on one device; returns the losses, and a fingerprint."""
    model = model_of(1)
    losses, _ = fit(model, Batches(), EPOCHS, pathlib.Path(folder) / "one.safetensors")
    kernel = model.get_layer("second").kernel
    return losses, fingerprint.fingerprint(kernel)["samples"], snapshot(model.trainable_variables)


def main(rank, port, folder):
    keras.distribution.initialize(f"localhost:{port}", 2, rank)
    assert jax.process_count() == 2
    found = {name: check(name, rank, folder) for name in ("data", "model")}
    print("RESULT" + json.dumps(found))
    jax.distributed.shutdown()
