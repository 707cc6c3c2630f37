"""What `fit` does, written by hand for each backend: as a `train_step`, and as a loop."""

import keras
import numpy as np
from tiny_models import labels

BATCH = 4


def loss_of(targets, outputs):
    losses = keras.losses.sparse_categorical_crossentropy(targets, outputs, from_logits=True)
    return keras.ops.mean(losses)


def _jax_train_step(model, state, data):
    import jax

    trainable, others, optimizer_state, metrics = state
    inputs, targets = data[:2]

    def compute(trainable, others):
        outputs, new_others = model.stateless_call(trainable, others, inputs, training=True)
        loss = loss_of(targets, outputs)
        # `scale_loss` reads a variable of the optimizer, whose value is an argument here.
        scope = keras.StatelessScope(
            state_mapping=list(zip(model.optimizer.variables, optimizer_state, strict=True))
        )
        with scope:
            return model.optimizer.scale_loss(loss), (loss, new_others)

    compute = jax.value_and_grad(compute, has_aux=True)
    (_, (loss, others)), gradients = compute(trainable, others)
    trainable, optimizer_state = model.optimizer.stateless_apply(
        optimizer_state, gradients, trainable
    )
    return {"loss": loss}, (trainable, others, optimizer_state, metrics)


def _tensorflow_train_step(model, data):
    import tensorflow as tf

    inputs, targets = data[:2]
    with tf.GradientTape() as tape:
        loss = loss_of(targets, model(inputs, training=True))
        scaled = model.optimizer.scale_loss(loss)
    variables = model.trainable_variables
    gradients = tape.gradient(scaled, [variable.value for variable in variables])
    model.optimizer.apply(gradients, variables)
    return {"loss": loss}


def _torch_train_step(model, data):
    import torch

    inputs, targets = data[:2]
    model.zero_grad()
    loss = loss_of(targets, model(inputs, training=True))
    model.optimizer.scale_loss(loss).backward()
    gradients = [variable.value.grad for variable in model.trainable_variables]
    with torch.no_grad():
        model.optimizer.apply(gradients, model.trainable_variables)
    return {"loss": loss.detach()}


TRAIN_STEPS = {
    "jax": _jax_train_step,
    "tensorflow": _tensorflow_train_step,
    "torch": _torch_train_step,
}


@keras.saving.register_keras_serializable("tests")
class OwnTrainStep(keras.Model):
    """A functional model that trains by the `train_step` above."""

    steps = 0

    def train_step(self, *args):
        type(self).steps += 1
        return TRAIN_STEPS[keras.backend.backend()](self, *args)


def train(model, inputs, optimizer, epochs):
    """Trains without `compile` and `fit`; returns the mean loss of each epoch."""
    optimizer.build(model.trainable_variables)
    runner = {"jax": _jax_loop, "tensorflow": _tensorflow_loop, "torch": _torch_loop}
    model.optimizer = optimizer
    batches = [
        (inputs[start : start + BATCH], labels(len(inputs))[start : start + BATCH])
        for start in range(0, len(inputs), BATCH)
    ]
    losses = runner[keras.backend.backend()](model, batches * epochs)
    # What `fit` does at its end: an optimizer that averages hands its averages over.
    optimizer.finalize_variable_values(model.trainable_variables)
    return np.reshape(losses, (epochs, -1)).mean(axis=1)


def _jax_loop(model, batches):
    import jax

    step = jax.jit(lambda state, data: _jax_train_step(model, state, data))
    holders = [
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        [],
    ]
    state = tuple([variable.value for variable in group] for group in holders)
    losses = []
    for batch in batches:
        logs, state = step(state, batch)
        losses.append(float(logs["loss"]))
    for group, values in zip(holders, state, strict=True):
        for variable, value in zip(group, values, strict=True):
            variable.assign(value)
    return losses


def _tensorflow_loop(model, batches):
    import tensorflow as tf

    step = tf.function(lambda *batch: _tensorflow_train_step(model, batch))
    return [float(step(*map(tf.constant, batch))["loss"]) for batch in batches]


def _torch_loop(model, batches):
    tensors = [tuple(map(keras.ops.convert_to_tensor, batch)) for batch in batches]
    return [float(_torch_train_step(model, batch)["loss"]) for batch in tensors]
