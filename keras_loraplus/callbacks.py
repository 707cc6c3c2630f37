"""Callbacks for training adapters."""

import os
from typing import Any

import keras

from keras_loraplus import _compat
from keras_loraplus.adapters.checkpoint import (
    check_savable,
    restore_checkpoint,
    write_checkpoint,
)
from keras_loraplus.monitor import LoRAPlusMonitor

__all__ = ["AdapterCheckpoint", "LoRAPlusMonitor"]


class AdapterCheckpoint(keras.callbacks.Callback):
    """Saves the state of training an adapted model in one small file, and resumes from it.

    Like `keras.callbacks.BackupAndRestore`, but it leaves out the frozen weights and adds random
    states. The file holds A, B and what else trains, what training calls write to (the moving
    statistics of batch normalisation that trains), the states of seed generators and, on torch, of
    its global generators, all variables of the optimizer (moments, iteration, learning rate, loss
    scale), and the position. It is written whole or not at all, and every byte of it is checked
    when it is read.

    Where `fit` begins and the file exists, the state is restored and the epochs that are done are
    skipped. Resuming is then bit for bit as if training had not stopped, dropout included, provided
    that the data come in the same order: `shuffle=False`, or data that are shuffled by their own
    seed and epoch. The state of other callbacks and of metrics is not in the file.

    The frozen base is not in the file either: load it, enable the model and compile it as before.
    Another base gets a warning. Of several named adapters the active one is saved. If several
    processes train one model, only the first writes, and all of them read: the file has to be where
    all of them see it. With `torch.distributed` or `jax.distributed` they wait for one another
    where `fit` begins.

    Args:
        filepath: The file, for example `"run.safetensors"`. Its folder is created. Each save
            replaces the one before.
        save_freq: `"epoch"`, or a number of batches. Saved inside an epoch, the state is exact, but
            `fit` can only start that epoch again from its first batch, as with `BackupAndRestore`;
            `resumed_from["batch"]` says how many batches of it had been done.
        delete_checkpoint: Whether to delete the file once `fit` has finished. Defaults to False; a
            later `fit` with more epochs then goes on from it, and one with as many does nothing.

    Attributes:
        resumed_from: `{"epoch": ..., "batch": ...}` of the file that `fit` began with, or None.

    Raises:
        ValueError: If an argument is not as above; where `fit` begins, if the model has no adapters
            or the file does not fit the model, in which case nothing has been changed.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(8), dense(2)])
        >>> report = klp.enable_lora_plus(model, rank=2, dropout=0.1)
        >>> model.compile(klp.LoRAPlusAdamW(1e-3), loss="mse")
        >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
        >>> saved = klp.callbacks.AdapterCheckpoint(path)
        >>> x, y = np.ones((8, 4)), np.ones((8, 2))
        >>> _ = model.fit(x, y, epochs=3, shuffle=False, verbose=0, callbacks=[saved])
        >>> later = model.fit(x, y, epochs=5, shuffle=False, verbose=0, callbacks=[saved])
        >>> later.epoch, saved.resumed_from
        ([3, 4], {'epoch': 3, 'batch': 0})

    Source: the behaviour of `keras.callbacks.BackupAndRestore`.
    """

    def __init__(
        self,
        filepath: Any,
        save_freq: str | int = "epoch",
        delete_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(filepath, (str, os.PathLike)) or not os.fspath(filepath):
            raise ValueError(
                "`filepath` must be the path of a file, for example 'run.safetensors'. Received: "
                f"{filepath!r}"
            )
        counts = isinstance(save_freq, int) and not isinstance(save_freq, bool) and save_freq > 0
        if save_freq != "epoch" and not counts:
            raise ValueError(
                "`save_freq` must be 'epoch' or a positive number of batches. Received: "
                f"{save_freq!r}"
            )
        self.filepath = os.fspath(filepath)
        self.save_freq = save_freq
        self.delete_checkpoint = delete_checkpoint
        self.resumed_from: dict[str, int] | None = None
        self._epoch = 0
        self._batches_done = 0
        self._batches_unsaved = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Restores the state of the file, if there is one."""
        model = self.model
        if os.path.isdir(self.filepath):
            raise ValueError(f"`filepath` must be a file, and '{self.filepath}' is a folder.")
        if model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        check_savable(model)
        self._batches_unsaved = 0
        self.resumed_from = None
        # The first process may still be writing what another is about to read.
        _compat.wait_for_all_processes()
        if os.path.exists(self.filepath):
            self.resumed_from = restore_checkpoint(model, self.filepath)
            _compat.begin_at_epoch(model, self.resumed_from["epoch"])
        else:
            os.makedirs(os.path.dirname(os.path.abspath(self.filepath)), exist_ok=True)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes the epoch."""
        # `fit` has read it, and the next `fit` is to begin where it is told.
        _compat.begin_at_epoch(self.model, None)
        self._epoch = epoch
        self._batches_done = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves, if as many batches have been done as `save_freq` says."""
        # One call covers several batches where `compile` was given `steps_per_execution`.
        self._batches_unsaved += batch + 1 - self._batches_done
        self._batches_done = batch + 1
        if self.save_freq != "epoch" and self._batches_unsaved >= int(self.save_freq):
            self._batches_unsaved = 0
            steps = self.params.get("steps")
            if steps is not None and self._batches_done >= steps:
                self._save(self._epoch + 1, 0)
            else:
                self._save(self._epoch, self._batches_done)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves, if `save_freq` is `"epoch"`."""
        if self.save_freq == "epoch":
            self._save(epoch + 1, 0)

    def on_train_end(self, logs: Any = None) -> None:
        """Deletes the file, if `delete_checkpoint` is set."""
        _compat.begin_at_epoch(self.model, None)
        exists = os.path.exists(self.filepath)
        if self.delete_checkpoint and exists and _compat.is_first_process(self.model):
            os.remove(self.filepath)

    def _save(self, epoch: int, batch: int) -> None:
        model = self.model
        variables = [*model.variables, *(model.optimizer.variables if model.optimizer else ())]
        if _compat.is_first_process(model) or _compat.span_processes(variables):
            write_checkpoint(model, self.filepath, epoch, batch)
