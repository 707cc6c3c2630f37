"""What each of two processes does in `training/test_torch_ddp.py`."""

import json
import pathlib

import keras
import numpy as np
import torch
from lora_cases import randomize_factors, snapshot
from tiny_models import compile_model, features, functional, labels

import keras_loraplus as klp
from keras_loraplus import callbacks

ROWS, EPOCHS = 64, 3


def model_of(seed):
    """An adapted, compiled model; its weights depend on the seed."""
    keras.utils.set_random_seed(seed)
    model = functional()
    if seed:
        for variable in model.weights:
            variable.assign(np.random.default_rng(seed).normal(size=variable.shape))
    klp.enable_lora_plus(model, rank=2)
    randomize_factors(model, seed)
    compile_model(model, klp.LoRAPlusAdamW(1e-2, lr_ratio=4.0, global_clipnorm=0.05))
    return model


def data():
    return features(ROWS), labels(ROWS)


def state(model):
    return [*snapshot(model.weights), *snapshot(model.optimizer.variables)]


class Hooked(torch.nn.parallel.DistributedDataParallel):
    """Notes which parameters the gradients of each bucket belong to."""

    buckets: list = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, self.note)

    @staticmethod
    def note(_, bucket):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        Hooked.buckets.append({id(parameter) for parameter in bucket.parameters()})
        return allreduce_hook(None, bucket)


def main(rank, rendezvous, folder):
    """Trains one epoch, then goes on in new models to the last; prints what happened."""
    import torch_ddp

    folder = pathlib.Path(folder)
    torch.nn.parallel.DistributedDataParallel = Hooked
    writes = []
    write = callbacks.write_checkpoint
    callbacks.write_checkpoint = lambda *args: (writes.append(args[2]), write(*args))
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    path = folder / "run.safetensors"
    # Each process begins with weights of its own: those of the first have to win.
    model = model_of(rank)
    losses = torch_ddp.train(model, *data(), 1, callbacks.AdapterCheckpoint(path), rank, 2)
    trained = [variable.value for variable in model.trainable_variables]
    ids = [{id(value) for value in trained} == found for found in Hooked.buckets]
    frozen = [value.grad for value in model.parameters() if not value.requires_grad]
    torch.distributed.barrier()

    second = model_of(rank)
    again = callbacks.AdapterCheckpoint(path)
    losses += torch_ddp.train(second, *data(), EPOCHS, again, rank, 2)
    np.savez(folder / f"{rank}.npz", *state(second))
    torch.distributed.destroy_process_group()
    result = {
        "losses": losses,
        "writes": writes,
        "buckets hold what trains": ids,
        "frozen gradients": [gradient is not None for gradient in frozen],
        "resumed": again.resumed_from,
        "files": sorted(path.name for path in folder.iterdir() if path.suffix != ".npz"),
    }
    print("RESULT" + json.dumps(result))
