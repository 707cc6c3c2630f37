"""What is traced, compiled and recorded: functions, the graphs of models, gradients."""

import contextlib

import keras
from keras.src import backend as keras_backend  # private: checked on 3.15.1

from keras_loraplus._compat.layers import flatten_layers


def trace(function, *args, **kwargs):
    """Runs a function on symbolic tensors without computing anything (3.15.1)."""
    return keras_backend.compute_output_spec(function, *args, **kwargs)


def clear_compiled_state(model):
    """Makes `fit` and `evaluate` ask for `compile` again, and `predict` trace again.

    `Trainer.compiled` and the traced functions (3.15.1): Keras has no public way to take a
    `compile` back. An optimizer that was built goes too: it knows variables that train no more, and
    a file of the model would hold its state. One that was not built holds nothing of the model;
    KerasHub makes it with every task, and expects it in the task's files. Before it is built an
    optimizer has its iteration count and rate; `built` is False again where variables are gone.
    """
    if not getattr(model, "compiled", False):
        model.predict_function = None
        return
    model.compiled = False
    if model.optimizer is not None and len(model.optimizer.variables) > 2:
        model.optimizer = None
    model.train_function = None
    model.test_function = None
    model.predict_function = None


def node_inputs(tensor):
    """Returns the operation that made a symbolic tensor and the symbolic tensors it read.

    `KerasTensor._keras_history` and `Operation._inbound_nodes` (3.15.1): the public graph of a
    functional model names layers, not which of them make the outputs.
    """
    operation, node_index, _ = tensor._keras_history
    return operation, operation._inbound_nodes[node_index].input_tensors


@contextlib.contextmanager
def graph_left_untouched(model):
    """Removes the graph nodes that a symbolic call inside the block adds to the model's layers."""
    layers = flatten_layers(model)
    counts = [(layer, len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in layers]
    try:
        yield
    finally:
        for layer, inbound, outbound in counts:
            del layer._inbound_nodes[inbound:]
            del layer._outbound_nodes[outbound:]


def outside_of_graphs():
    """Runs a block at once even while TensorFlow traces a function (tensorflow 2.21).

    An optimizer is built, and so gets a state that was loaded before, inside of the trace of a
    custom training step; an assignment in the trace would be repeated every step.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def runs_its_graph(layer):
    """Whether a functional model calls what its graph holds, and nothing else.

    A subclass of `keras.src.models.Functional` (3.15.1) may override `call` and use more layers.
    """
    from keras.src.models import Functional

    return isinstance(layer, Functional) and type(layer).call is Functional.call


def without_gradients():
    """Runs a block without recording gradients.

    Keras (3.15.1) has no public word for it; torch 2.13 would keep every activation otherwise. The
    other backends record only where they are asked to.
    """
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()
