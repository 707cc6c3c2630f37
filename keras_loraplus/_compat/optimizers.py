"""Optimizers: their classes and variables, decay, and float32 steps of low precision."""

import sys

import keras

from keras_loraplus._compat.torch_optimizers import torch_decay

LOW_PRECISION = ("bfloat16", "float16")


def active_optimizer_class(stock):
    """Returns the class that the active backend really uses for a Keras optimizer class.

    On torch `keras.optimizers.AdamW(...)` gives an instance of a subclass with `_foreach` kernels,
    picked by exact class in `__new__` (3.15.1); a subclass of the public class would miss it.
    Asking `__new__` creates no variable, and so no device.
    """
    return type(stock.__new__(stock))


def defined_outside_keras(cls, method):
    """Whether a class that is not part of Keras defines the method."""
    return any(
        method in vars(base) and base.__module__.split(".")[0] != "keras" for base in cls.__mro__
    )


def is_low_precision(variable):
    """Whether a variable (Keras's or the backend's) has fewer bits than float32."""
    return keras.backend.standardize_dtype(variable.dtype) in LOW_PRECISION


class Float32Copy(keras.Variable):
    """A float32 stand-in for a low-precision variable during one optimizer step.

    An optimizer that is handed the copy does its mathematics, scalars included, in float32, since
    Keras casts everything to the dtype of the variable. Only what optimizers use works.
    `Variable.__init__` is bypassed on purpose: it would create a backend variable (3.15.1).
    """

    def __init__(self, original):
        self.original = original
        self._value = keras.ops.cast(original, "float32")
        self._shape = original.shape
        self._ndim = len(original.shape)
        self._name = original.name
        self._path = getattr(original, "path", original.name)
        self._overwrite_with_gradient = False

    @property
    def value(self):
        return self._value

    @property
    def dtype(self):
        return "float32"

    def assign(self, value):
        self._value = dense(keras.ops.cast(value, "float32"))
        return self._value

    def assign_add(self, value):
        return self.assign(self._value + dense(keras.ops.cast(value, "float32")))

    def assign_sub(self, value):
        return self.assign(self._value - dense(keras.ops.cast(value, "float32")))

    def write_back(self):
        """Rounds the result into the original variable."""
        value = keras.ops.cast(self._value, self.original.dtype)
        self.original.assign(value)


def dense(value):
    """Returns TensorFlow's `IndexedSlices` as a tensor and anything else as it is.

    `keras.ops.convert_to_tensor` keeps `IndexedSlices` (3.15.1, tensorflow 2.21).
    """
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is not None and isinstance(value, tensorflow.IndexedSlices):
        return tensorflow.convert_to_tensor(value)
    return value


def decay(optimizer, variables, decays, multipliers):
    """Shrinks each variable by 1 - learning_rate * multiplier * decay.

    `_apply_weight_decay` (3.15.1) knows one rate only, and each backend has its own: TensorFlow
    goes through the distribution strategy, torch through a `_foreach` kernel. In float32 the
    operations and their order are Keras's on TensorFlow and JAX; low precision is decayed in
    float32.

    Args:
        optimizer: The optimizer; its `learning_rate` is read here, under TensorFlow inside the
            strategy's update.
        variables: Model variables.
        decays: Weight decay factors, one a variable; None or 0 for no decay.
        multipliers: Learning-rate multipliers, one a variable.
    """
    rows = [row for row in zip(variables, decays, multipliers, strict=True) if row[1]]
    backend = keras.backend.backend()
    if backend == "torch":
        torch_decay(optimizer, rows)
    elif backend == "tensorflow":
        _tensorflow_decay(optimizer, rows)
    else:
        for variable, weight_decay, multiplier in rows:
            if optimizer._use_weight_decay(variable):
                step = _decay_step(optimizer, variable, weight_decay, multiplier)
                variable.assign(variable - step)


def scaled_rate(learning_rate, multiplier):
    """Returns the rate times the multiplier in float32; untouched, and so exact, for 1."""
    if multiplier == 1.0:
        return learning_rate
    return keras.ops.cast(learning_rate, "float32") * multiplier


def _decay_step(optimizer, variable, weight_decay, multiplier):
    dtype = "float32" if is_low_precision(variable) else variable.dtype
    rate = keras.ops.cast(scaled_rate(optimizer.learning_rate, multiplier), dtype)
    return keras.ops.cast(variable, dtype) * keras.ops.cast(weight_decay, dtype) * rate


def _tensorflow_decay(optimizer, rows):
    import tensorflow as tf

    def update(variable, weight_decay, multiplier):
        # Keras asks for the exclusion here, with the backend's variable, whose name is a path.
        if optimizer._use_weight_decay(variable):
            step = _decay_step(optimizer, variable, weight_decay, multiplier)
            if is_low_precision(variable):
                variable.assign(tf.cast(tf.cast(variable, step.dtype) - step, variable.dtype))
            else:
                variable.assign_sub(step)

    def update_all(distribution, rows):
        for variable, *factors in rows:
            distribution.extended.update(variable, update, args=factors, group=False)

    rows = [(v.value if isinstance(v, keras.Variable) else v, *factors) for v, *factors in rows]
    tf.__internal__.distribute.interim.maybe_merge_call(
        update_all, optimizer._distribution_strategy, rows
    )


def learning_rate_variable(optimizer):
    """Returns the variable that holds an optimizer's rate, None where a schedule gives it.

    `Optimizer._learning_rate` (3.15.1): the public property reads a value.
    """
    return getattr(innermost_optimizer(optimizer), "_learning_rate", None)


def optimized_variables(optimizer):
    """Returns the model variables that an optimizer was built on.

    `Optimizer._trainable_variables` (3.15.1): the public `variables` are the optimizer's own.
    """
    return list(innermost_optimizer(optimizer)._trainable_variables)


def innermost_optimizer(optimizer):
    """Returns the optimizer inside of any number of `LossScaleOptimizer`s."""
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer


def gradient_accumulation_steps(optimizer):
    """Returns after how many steps an optimizer changes the variables.

    The attribute of that name (3.15.1) is None for 1 and is not in the documentation.
    """
    return innermost_optimizer(optimizer).gradient_accumulation_steps or 1
