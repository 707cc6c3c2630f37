"""Going on with a run: random states, epochs, and which process writes."""

import keras


def random_states():
    """Returns random states that are no Keras variables, as arrays by name.

    torch's own dropout, which Keras uses where no seed was given (3.15.1), draws from torch's
    global generators (torch 2.13). The other backends have none.
    """
    if keras.backend.backend() != "torch":
        return {}
    import torch

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return {name: state.numpy() for name, state in states.items()}


def restore_random_states(states):
    """Puts back what `random_states` returned; states of devices that are not here are left out."""
    if keras.backend.backend() != "torch":
        return
    import torch

    for name, state in states.items():
        state = torch.from_numpy(state.copy())
        if name == "cpu":
            torch.set_rng_state(state)
        elif int(name.partition(":")[2]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)


def begin_at_epoch(model, epoch):
    """Makes the `fit` that is beginning start at this epoch; None for what it was told.

    `Trainer._initial_epoch` (3.15.1), which `fit` reads after `on_train_begin` and never resets;
    Keras's own `BackupAndRestore` sets it likewise.
    """
    model._initial_epoch = epoch


def is_first_process(model):
    """Whether this process is the one that writes files, where several train one model.

    Keras has no public word for it on all backends (3.15.1; jax 0.10.2, tensorflow 2.21, torch
    2.13).
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.process_index() == 0
    if backend == "torch":
        import torch

        distributed = torch.distributed
        started = distributed.is_available() and distributed.is_initialized()
        return not started or distributed.get_rank() == 0
    return bool(model.distribute_strategy.extended.should_checkpoint)
