"""Optimizer state that is read from a file before the optimizer is built.

`model.load_weights` on a compiled model that has not trained yet finds an optimizer without
moments. Keras skips such a state with a warning, and training would go on from moments of zero.
Here it waits for `build`.
"""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_loraplus import _compat


@dataclasses.dataclass
class EarlyState:
    """State of one optimizer that waits for `build`.

    Attributes:
        arrays: All arrays of the file, in the order of the optimizer's variables.
        loaded: How many of them, from the first, were there before `build` and have been assigned:
            the iteration and, unless it is a schedule, the learning rate.
        wrapper: A `LossScaleOptimizer` around the optimizer whose own state waits too, or None.
        wrapper_arrays: That state: step counter and scale.
    """

    arrays: list
    loaded: int
    wrapper: Any = None
    wrapper_arrays: tuple = ()


def take(optimizer: Any, variables: list, store: Any) -> EarlyState | None:
    """Assigns what an unbuilt optimizer has a variable for, and returns what has to wait.

    Args:
        optimizer: The optimizer, for its name.
        variables: The variables it has before `build`.
        store: Dict-like of arrays under `"0"`, `"1"`, ...

    Returns:
        The state, or None where the file holds no more than has been assigned, or nothing.

    Raises:
        ValueError: If the file holds fewer arrays, or another shape; nothing has been assigned.
    """
    count = len(store.keys())
    if not count:
        return None
    # Copies: the file is closed long before `build`.
    arrays = [np.array(store[str(position)]) for position in range(count)]
    _check(optimizer, variables, arrays[: len(variables)])
    for variable, array in zip(variables, arrays, strict=False):
        variable.assign(array)
    return EarlyState(arrays, len(variables)) if count > len(variables) else None


def apply(optimizer: Any, variables: list, state: EarlyState) -> None:
    """Assigns a waiting state to the optimizer that has just been built.

    Args:
        optimizer: The optimizer, for its name.
        variables: All its variables.
        state: What `take` returned.

    Raises:
        ValueError: If the number of arrays or a shape differs; nothing has been assigned.
    """
    _check(optimizer, variables, state.arrays)
    own = list(zip(variables, state.arrays, strict=True))[state.loaded :]
    if state.wrapper is not None:
        own += zip(_scalars_of(state.wrapper), state.wrapper_arrays, strict=True)
    with _compat.outside_of_graphs():
        for variable, array in own:
            variable.assign(array)


def store_unbuilt(variables: list, state: EarlyState, store: Any) -> None:
    """Writes the state of an optimizer that was loaded but not built, so that it is not lost."""
    for position, array in enumerate(state.arrays):
        early = position < state.loaded
        store[str(position)] = keras.ops.convert_to_numpy(variables[position]) if early else array


def of(model: Any) -> list:
    """Returns the states that wait in a model's optimizer, for `put_back`."""
    optimizer = getattr(model, "optimizer", None)
    optimizers: list = [optimizer, getattr(optimizer, "inner_optimizer", None)]
    found = [one._loraplus for one in optimizers if hasattr(one, "load_wrapped_state")]
    return [(holder, holder.early) for holder in found]


def put_back(states: list) -> None:
    """Undoes what a trial of loading has changed: it assigned nothing but kept what it read."""
    for holder, early in states:
        holder.early = early


def check_shapes(optimizer: Any, variables: list, store: Any) -> None:
    """Raises before a built optimizer's state is half loaded; a wrong count is left to Keras.

    Raises:
        ValueError: If a shape differs.
    """
    if len(store.keys()) == len(variables):
        _check(optimizer, variables, [store[str(i)] for i in range(len(variables))])


def _check(optimizer: Any, variables: list, arrays: list) -> None:
    found = [tuple(array.shape) for array in arrays]
    expected = [tuple(variable.shape) for variable in variables]
    if found == expected:
        return
    reason = f"{len(found)} arrays where the optimizer has {len(expected)} variables"
    if len(found) == len(expected):
        at = next(i for i, shape in enumerate(found) if shape != expected[i])
        reason = f"shape {found[at]} for '{variables[at].name}', whose shape is {expected[at]}"
    raise ValueError(
        f"The file's optimizer state does not fit the optimizer '{optimizer.name}' "
        f"({type(optimizer).__name__}): it holds {reason}. It was saved by another optimizer, or "
        "for other trainable variables, and has not been loaded. Enable, compile and load as in "
        "the run that saved it; to train from a fresh state, call `model.compile` with a new "
        "optimizer after the weights have been loaded."
    )


def _scalars_of(wrapper: Any) -> tuple:
    return wrapper.step_counter, wrapper.dynamic_scale


def _load_wrapped(self: Any, store: Any) -> None:
    """Loads a `LossScaleOptimizer`; as Keras does, unless it is unbuilt around a LoRA+ optimizer.

    Its file holds its own variables, two of which `build` creates, then those of the optimizer it
    wraps.
    """
    inner = self.inner_optimizer
    count = len(store.keys())
    waits = not self.built and hasattr(inner, "load_wrapped_state")
    if not waits or count == len(self.variables):
        super(keras.optimizers.LossScaleOptimizer, self).load_own_variables(store)
        return
    if not count:
        return
    own = len(self._variables)
    arrays = [np.array(store[str(position)]) for position in range(count)]
    _check(self, self._variables, arrays[:own])
    scalars, rest = arrays[own : own + 2], arrays[own + 2 :]
    if [array.shape for array in scalars] != [(), ()]:
        raise ValueError(
            f"The file's optimizer state was not saved by a LossScaleOptimizer like '{self.name}': "
            f"expected two scalars after its first {own} arrays, received shapes "
            f"{[array.shape for array in scalars]}. Compile as in the run that saved it."
        )
    inner.load_wrapped_state({str(i): array for i, array in enumerate(rest)}, self, tuple(scalars))
    for variable, array in zip(self._variables, arrays, strict=False):
        variable.assign(array)


# Keras wraps an optimizer by itself under `mixed_float16`, so there is no class of this package to
# override it in. It inherits the method (3.15.1); for other optimizers it stays what it was.
keras.optimizers.LossScaleOptimizer.load_own_variables = _load_wrapped
