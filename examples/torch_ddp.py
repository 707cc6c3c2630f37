"""Trains adapters in several processes with PyTorch's DistributedDataParallel.

    python torch_ddp.py --processes 2               # starts its processes itself
    torchrun --nproc-per-node 2 torch_ddp.py        # or is started as any DDP program

Every process takes its share of each batch. DistributedDataParallel (DDP) averages the gradients of
what trains, which is A, B and the output layer: frozen kernels are in no bucket and never travel
after the start. The optimizer sees averaged gradients in every process, so its clipping and its
ratio are those of one process with the whole batch, and all copies of the adapters stay equal.

The first process alone writes: the checkpoint after each epoch, from which another run goes on, and
the adapter file at the end. The task is that of `custom_keras_model.py`: a new sensor.
"""

import os
import pathlib
import tempfile

import numpy as np

from custom_keras_model import build_model, new_sensor, readings
from text_classification.console import Parser, choose_backend, integer, quiet_stderr, run

GLOBAL_BATCH = 32


def trained_base(keras):
    """Returns the weights of the base, trained (or, elsewhere, loaded) by one process alone.

    Before the processes are a group: inside of one, newer versions of Keras share the work of `fit`
    among its processes, and wait for all of them.
    """
    keras.utils.set_random_seed(0)
    base = build_model(keras)
    x, y = readings(np.random.default_rng(0), 1024)
    base.compile(
        keras.optimizers.AdamW(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    base.fit(x, y, batch_size=64, epochs=5, verbose=0)
    return base.get_weights()


def adapted_model(keras, klp, weights=None):
    """Returns the model with adapters, compiled, made alike in each process.

    Only the first process has the base's weights: DDP sends them to the others.
    """
    keras.utils.set_random_seed(0)
    model = build_model(keras)
    if weights is not None:
        model.set_weights(weights)
    klp.enable_lora_plus(model, rank=4)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(klp.LoRAPlusAdamW(2e-3, lr_ratio=16.0, global_clipnorm=1.0), loss=loss)
    return model


def train(model, x, y, epochs, checkpoint, rank=0, processes=1):
    """The training loop of one process.

    Args:
        model: The adapted, compiled model.
        x: All inputs, the same in every process.
        y: All labels.
        epochs: Number of epochs in all; those that a checkpoint says are done are left out.
        checkpoint: A `klp.callbacks.AdapterCheckpoint`.
        rank: Number of this process.
        processes: Number of processes, which must divide the batch.

    Returns:
        Mean loss of each epoch that this process trained, over the whole batches.
    """
    import torch
    from torch.nn.parallel import DistributedDataParallel

    # On GPUs: one process a GPU, and `device_ids=[rank]`.
    parallel = DistributedDataParallel(model)
    optimizer, variables = model.optimizer, model.trainable_variables
    checkpoint.set_model(model)
    checkpoint.set_params({"epochs": epochs, "steps": len(x) // GLOBAL_BATCH})
    checkpoint.on_train_begin()
    done = checkpoint.resumed_from["epoch"] if checkpoint.resumed_from else 0
    history = []
    for epoch in range(done, epochs):
        checkpoint.on_epoch_begin(epoch)
        order = np.random.default_rng(epoch).permutation(len(x))
        losses = []
        for step in range(len(x) // GLOBAL_BATCH):
            batch = order[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
            mine = batch[rank::processes]  # equal shares: the mean of means is the mean
            parallel.zero_grad()
            outputs = parallel(torch.from_numpy(x[mine]), training=True)
            loss = model.loss(torch.from_numpy(y[mine]), outputs)
            loss.backward()  # DDP averages the gradients here
            gradients = [variable.value.grad for variable in variables]
            with torch.no_grad():
                optimizer.apply(gradients, variables)
            checkpoint.on_train_batch_end(step)
            mean = loss.detach() / processes
            torch.distributed.all_reduce(mean)
            losses.append(float(mean))
        checkpoint.on_epoch_end(epoch)
        history.append(float(np.mean(losses)))
    checkpoint.on_train_end()
    return history


def work(rank, processes, rendezvous, epochs, output):
    """What one process does."""
    with quiet_stderr():
        import keras
        import torch

        import keras_loraplus as klp

    weights = trained_base(keras) if rank == 0 else None
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=processes
    )
    try:
        model = adapted_model(keras, klp, weights)
        rng = np.random.default_rng(1)
        x, y = readings(rng, 512)
        x = new_sensor(rng, x)
        checkpoint = klp.callbacks.AdapterCheckpoint(output / "run.safetensors")
        losses = train(model, x, y, epochs, checkpoint, rank, processes)
        if rank == 0:
            klp.save_adapter(model, output / "adapter.safetensors")
            begin = epochs - len(losses)
            for epoch, loss in enumerate(losses, start=begin + 1):
                print(f"epoch {epoch}, {processes} processes: loss {loss:.4f}")
    finally:
        torch.distributed.destroy_process_group()


def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=integer(1), default=2, help="unless torchrun says")
    parser.add_argument("--epochs", type=integer(1), default=10)
    parser.add_argument("--output", default="outputs/torch_ddp", help="folder to write to")
    options = parser.parse_args(arguments)
    choose_backend("torch")
    output = pathlib.Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        processes = int(os.environ["WORLD_SIZE"])
    else:
        processes = options.processes
    if GLOBAL_BATCH % processes:
        parser.error(f"the batch of {GLOBAL_BATCH} cannot be shared equally by {processes}")
    if "RANK" in os.environ:
        work(int(os.environ["RANK"]), processes, "env://", options.epochs, output)
        return
    import torch

    with tempfile.TemporaryDirectory() as folder:
        rendezvous = pathlib.Path(folder, "rendezvous").resolve().as_uri()
        torch.multiprocessing.spawn(
            work, (processes, rendezvous, options.epochs, output), nprocs=processes
        )


if __name__ == "__main__":
    run(main)
