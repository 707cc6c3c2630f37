"""Several devices: replicas of `tf.distribute`, layouts of `keras.distribution`."""

import contextlib
import re

import keras
import numpy as np
from keras.src import backend as keras_backend  # private: checked on 3.15.1
from keras.src.backend.common import global_state  # private: checked on 3.15.1


@contextlib.contextmanager
def laid_out_as(kernel, axes):
    """Lays out what a layer adds inside the block over devices as its kernel is.

    Under `keras.distribution.ModelParallel` a variable's layout is looked up by its path. A rule
    for kernels, `.*query.*kernel.*` say, also matches `query/lora_kernel_a`, which has other axes.
    So a rule counts for a factor only if it does not match the kernel itself; otherwise the factor
    takes the layout of the kernel's axes, and its rank is on every device.

    The layout counts, not the scope: a model that was distributed can be adapted outside of
    `distribution.scope()`, where no rules are known.

    `Layer.add_weight` takes no layout, `Variable._layout` and `ModelParallel._layout_map` are not
    public, and the current distribution is asked for by attribute (3.15.1).

    Args:
        kernel: The frozen variable.
        axes: For every axis of the new variable the kernel's axis, None for none of them.
    """
    outer = keras.distribution.distribution()
    layout = getattr(kernel, "_layout", None)
    if not isinstance(layout, keras.distribution.TensorLayout):
        yield
        return
    global_state.set_global_attribute("distribution", _LaidOutAs(outer, kernel, axes))
    try:
        yield
    finally:
        global_state.set_global_attribute("distribution", outer)


class _LaidOutAs:
    """Answers what a new variable asks of the current distribution."""

    def __init__(self, outer, kernel, axes):
        self.outer, self.kernel, self.axes = outer, kernel, axes

    def get_variable_layout(self, variable):
        rules = getattr(self.outer, "_layout_map", {})
        own = [
            rule
            for rule in rules
            if _matches(rule, variable.path) and not _matches(rule, self.kernel.path)
        ]
        if len(own) == 1:
            return rules[own[0]]
        if own:
            return rules[variable.path]  # the exact one, or Keras's error that lists them
        layout = self.kernel._layout
        axes = [None if axis is None else layout.axes[axis] for axis in self.axes]
        return keras.distribution.TensorLayout(axes, layout.device_mesh)


def _matches(rule, path):
    return rule == path or re.fullmatch(rule, path) is not None


def replica_count():
    """Returns over how many replicas of a `tf.distribute` strategy the running step is spread.

    1 on JAX and torch, outside of `strategy.run`, and where the strategy has one (tensorflow 2.21).
    """
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def refuse_conditions_in_replicas(**settings):
    """Raises where Keras's optimizer would put a sum over replicas into one branch of a condition.

    tensorflow 2.21 cannot trace that, and says so without naming the setting that asks for it
    (3.15.1).

    Args:
        settings: The optimizer's settings that are conditions, by name.

    Raises:
        ValueError: If one of them is set and the step runs on several replicas.
    """
    asked = [f"{name}={value}" for name, value in settings.items() if value]
    if asked and replica_count() > 1:
        raise ValueError(
            f"{' and '.join(asked)} cannot be used under a `tf.distribute` strategy with several "
            "replicas: TensorFlow cannot sum gradients over replicas inside of a condition. Leave "
            "it out and pass a larger batch to `fit`, or train on one device. Nothing has been "
            "changed."
        )


def check_distribution(layer):
    """Raises where what is added to a layer would be on other devices than what is there.

    Checked on 3.15.1: `fit` would end in an empty AssertionError (tensorflow 2.21), or in an error
    of incompatible devices that leaves the weights as None (jax 0.10.2). `Variable._layout` and
    `_value`, and `_distribute_strategy` of TensorFlow's variables, have no public readers.

    Args:
        layer: A layer or model that is to gain weights.

    Raises:
        ValueError: Naming a variable and the scope to open.
    """
    if keras.backend.backend() == "tensorflow":
        _check_strategy(layer)
    outer = keras.distribution.distribution()
    if keras.backend.backend() != "jax" or outer is None:
        return
    for variable in layer.weights:
        if variable._layout is None and outer.get_variable_layout(variable) is not None:
            raise ValueError(
                f"'{variable.path}' of '{layer.name}' was made before the current "
                f"{type(outer).__name__} was set, so that the model is not distributed and Keras "
                "could not train it. Make the model inside of `with distribution.scope():`, or "
                "after `keras.distribution.set_distribution(distribution)`, then enable adapters "
                "or load them (`keras_loraplus.load_adapter`). Nothing has been changed."
            )


def _check_strategy(layer):
    import tensorflow as tf

    here = tf.distribute.get_strategy() if tf.distribute.has_strategy() else None
    for variable in layer.weights:
        made_under = getattr(variable._value, "_distribute_strategy", None)
        if made_under is here:
            continue
        advice = (
            "Leave the `with strategy.scope():` block before you enable adapters, or make the "
            "model inside of it"
            if made_under is None
            else "Enable adapters inside of the `with strategy.scope():` block that made the model"
        )
        raise ValueError(
            f"'{variable.path}' of '{layer.name}' was made under {_strategy_name(made_under)}, and "
            f"the current strategy is {_strategy_name(here)}; adapters have to be made under the "
            f"strategy of the weights that they stand beside. {advice}. Nothing has been changed."
        )


def _strategy_name(strategy):
    return "no tf.distribute strategy" if strategy is None else f"a {type(strategy).__name__}"


def parts_of(tensor):
    """Returns the parts of a tensor that this process holds, as pairs (offset, part).

    `keras.ops.slice` of an array that is sharded (jax 0.10.2) first gathers all of it on every
    device, since the place of the slice is an argument of the compiled function.

    Args:
        tensor: A tensor of the backend.

    Returns:
        A list; the tensor itself where one device has all of it.
    """
    if keras.backend.backend() != "jax" or tensor.is_fully_replicated:
        return [((0,) * len(tensor.shape), tensor)]
    parts = {}
    for shard in tensor.addressable_shards:
        parts[tuple(cut.start or 0 for cut in shard.index)] = shard.data
    return list(parts.items())


def span_processes(tensors):
    """Whether this process lacks a part of one of the tensors (jax 0.10.2)."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    if jax.process_count() == 1:
        return False
    return any(
        sum(part.size for _, part in parts_of(tensor)) < tensor.size
        for tensor in map(keras.ops.convert_to_tensor, tensors)
    )


def host_value(tensor):
    """Returns a tensor as a numpy array, also where other processes hold parts of it.

    Then every process has to come here. `multihost_utils` is public though experimental (jax
    0.10.2).
    """
    if not span_processes([tensor]):
        return keras.ops.convert_to_numpy(tensor)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(keras.ops.convert_to_tensor(tensor), tiled=True)


def known_anywhere(tensor, values):
    """Returns values read of a tensor, those that are NaN here from another process.

    Args:
        tensor: The tensor; if it spans processes, every process has to come here.
        values: A float numpy array.
    """
    if not span_processes([tensor]):
        return values
    from jax.experimental import multihost_utils

    # NaN where every process has it so.
    return np.fmax.reduce(multihost_utils.process_allgather(values))


def wait_for_all_processes():
    """Returns once every process that trains this model has come here; alone, at once.

    TensorFlow's multi-worker strategies have no public barrier (tensorflow 2.21); nothing is waited
    for there. `multihost_utils` is public though experimental (jax 0.10.2).
    """
    if keras.backend.backend() == "jax":
        import jax

        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("keras_loraplus")
    elif keras.backend.backend() == "torch":
        import torch

        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()


def on_device(value):
    """Returns a numpy array as the backend's, where `keras.ops` would compile a program for it.

    JAX (0.10.2) compiles one for each shape in `jnp.asarray`, to which
    `keras.ops.convert_to_tensor` leads (Keras 3.15.1), and none in `device_put`.
    """
    if keras_backend.backend() != "jax":
        return value
    import jax

    return jax.device_put(value)


def is_laid_out(variable):
    """Whether `keras.distribution` lays the variable out over devices.

    `Variable._layout` is not public (3.15.1). A slice of such a variable would gather its parts.
    """
    return getattr(variable, "_layout", None) is not None
