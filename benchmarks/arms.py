"""The ways to train one model that are compared: the arms of a case.

Keras is imported here with the backend that the worker's environment names.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np

import keras_loraplus as klp

SEED = 0
RANK = 8
RATE = 1e-4


class StepClock(keras.callbacks.Callback):
    """The seconds of each step of `fit`, up to where its loss is known."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])  # JAX hands over a result that it may still be computing.
        self.seconds.append(time.perf_counter() - self.start)


@dataclasses.dataclass
class Training:
    """One training step of a compiled model on one batch, as often as it is called."""

    model: keras.Model
    x: object
    y: object

    def __call__(self):
        # A KerasHub task's own train_on_batch would run its preprocessing pipeline.
        return keras.Model.train_on_batch(self.model, self.x, self.y)

    def seconds(self, steps):
        """Returns the seconds of each of so many steps of one `fit`.

        `train_on_batch` walks all layers and, on JAX, writes every variable back at each step;
        `fit` does so once, which is what a user's step has.
        """
        x, y = keras.tree.map_structure(lambda a: np.concatenate([a] * steps), (self.x, self.y))
        clock = StepClock()
        batch = len(keras.tree.flatten(self.x)[0])
        settings = {"batch_size": batch, "shuffle": False, "verbose": 0, "callbacks": [clock]}
        keras.Model.fit(self.model, x, y, **settings)
        return clock.seconds

    def compiled_on_jax(self):
        """Returns XLA's program of the step; the model must have done one."""
        import jax

        model = self.model
        groups = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
        state = tuple([variable.value for variable in group] for group in groups)
        step = jax.jit(model.train_step, donate_argnums=0)
        return step.lower(state, (self.x, self.y)).compile()


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a batch, and which of its layers are adapted.

    Attributes:
        build: Returns the model, the part of it that is adapted, x, y and the loss.
        targets: What `enable_lora_plus` is given.
        layers: Names of the layers that native LoRA adapts; None for KerasHub's own choice.
        first: Regular expression; of the variables whose path it fullmatches, the first is what
            trains in the frozen model, so that all of it is run backward.
        peft: Returns the step of the same model in PEFT, on torch, or None where it has none.
        adapted: Names of the layers that end up adapted, where `layers` is None.
    """

    build: Callable
    targets: object
    layers: Sequence[str] | None
    first: str
    peft: Callable | None = None
    adapted: Sequence[str] = ()

    def arms(self):
        """Returns {arm: function that builds it and returns its step}."""
        made = {
            name: functools.partial(self._training, prepare)
            for name, prepare in {
                "full": self._full,
                "native": self._native,
                "native_same": self._native_same,
                "ours": self._ours,
                "limit": self._limit,
            }.items()
        }
        if self.peft is not None and keras.backend.backend() == "torch":
            made["peft"] = self.peft
        return made

    def _training(self, prepare):
        keras.utils.set_random_seed(SEED)
        model, scope, x, y, loss = self.build()
        model.compile(prepare(scope), loss=loss)
        return Training(model, x, y)

    def _full(self, scope):
        """Every variable trains."""
        return keras.optimizers.AdamW(RATE)

    def _ours(self, scope):
        klp.enable_lora_plus(scope, rank=RANK, targets=self.targets)
        return klp.LoRAPlusAdamW(RATE)

    def _native(self, scope):
        """Keras's own LoRA as KerasHub enables it: biases of adapted layers train as well."""
        if hasattr(scope, "default_lora_layer_names"):
            scope.enable_lora(RANK, target_layer_names=self.layers)
            return keras.optimizers.AdamW(RATE)
        for layer in scope.layers:
            layer.trainable = False
        for layer in self._adapted_layers(scope):
            layer.trainable = True
            layer.enable_lora(RANK)
        return keras.optimizers.AdamW(RATE)

    def _native_same(self, scope):
        """Keras's own LoRA on the same layers, in which A and B alone train, as in ours."""
        optimizer = self._native(scope)
        for layer in self._adapted_layers(scope):
            if getattr(layer, "bias", None) is not None:
                layer.bias.trainable = False
        return optimizer

    def _adapted_layers(self, scope):
        names = self.layers or self.adapted
        return [layer for layer in scope._flatten_layers() if layer.name in names]

    def _limit(self, scope):
        """No adapter: one small variable at the start trains, so all of it is run backward."""
        for variable in scope.weights:
            variable.trainable = False
        paths = [v for v in scope.weights if re.fullmatch(self.first, v.path)]
        paths[0].trainable = True
        return keras.optimizers.AdamW(RATE)
