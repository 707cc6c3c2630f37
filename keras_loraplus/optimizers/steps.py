"""The step of a LoRA+ optimizer: each variable at its own rate, in float32."""

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras

from keras_loraplus import _compat

if TYPE_CHECKING:
    from keras.optimizers import Optimizer as _Optimizer
else:
    # The Keras class is another base of the classes that are made from the mixin.
    _Optimizer = object


class StepMixin(_Optimizer):
    """Scales the learning rate where Keras steps and decays.

    Keras 3.15.1 ends every step in `update_step` (one variable) or, on torch, in
    `_parallel_update_step` (all of them), so these two see the rate of a variable. Decay, which
    Keras computes from the one learning rate, is replaced. Clipping, accumulation, averaging and
    schedules stay Keras's own.

    Variables of low precision are stepped as float32 copies and rounded once at the end: in
    bfloat16 Adam's 0.999 is 1.
    """

    # Optimizer variables that a step advances once for all variables together.
    _advanced_once: tuple[str, ...] = ()
    # A user's class with a `_backend_update_step` of its own: that is called once a multiplier.
    _scales_backend_step = False

    def _are_all(self, variables: Sequence[Any]) -> bool:
        """Whether these are the variables that the optimizer was built on, in their order.

        The usual case, for which nothing has to be looked up variable by variable.
        """
        known = self._trainable_variables
        return len(variables) == len(known) and all(map(operator.is_, variables, known))

    def _multipliers_of(self, variables: Sequence[Any]) -> list[float]:
        """Returns the variables' multipliers, by index.

        TensorFlow hands `update_step` a `tf.Variable`, which has no path.
        """
        multipliers = self._loraplus.multipliers
        if self._are_all(variables):
            return multipliers
        return [multipliers[self._get_variable_index(variable)] for variable in variables]

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Updates the variables, as in Keras."""
        with self._applying():
            super().apply(grads, trainable_variables)

    def stateless_apply(
        self, optimizer_variables: Any, grads: Any, trainable_variables: Any
    ) -> tuple[Any, Any]:
        """Returns updated values of model and optimizer variables, as in Keras."""
        with self._applying():
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)

    @contextlib.contextmanager
    def _applying(self) -> Iterator[None]:
        previous = self._loraplus.in_apply
        self._loraplus.in_apply = True
        try:
            yield
        finally:
            self._loraplus.in_apply = previous

    def _backend_apply_gradients(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        _compat.refuse_conditions_in_replicas(
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            ema_overwrite_frequency=self.use_ema and self.ema_overwrite_frequency,
        )
        if self._loraplus.has_low_precision:
            # Norms and accumulated sums of low-precision gradients are float32 from here on.
            grads = [
                keras.ops.cast(grad, "float32") if _compat.is_low_precision(variable) else grad
                for grad, variable in zip(grads, variables, strict=True)
            ]
        super()._backend_apply_gradients(grads, variables)

    def _clips_whole_gradients(self) -> bool:
        """Whether this step clips under a `tf.distribute` strategy of several replicas."""
        clips = self.clipnorm or self.clipvalue or self.global_clipnorm
        return bool(clips) and _compat.replica_count() > 1

    def _clip_gradients(self, grads: Sequence[Any]) -> Sequence[Any]:
        """Clips the sum over all replicas, as one device with the whole batch would.

        Keras clips what each replica has, then sums: other numbers on two devices than on one.
        """
        if self._clips_whole_gradients():
            pairs = [(grad, None) for grad in grads]
            grads = [grad for grad, _ in super()._all_reduce_sum_gradients(pairs)]
        return super()._clip_gradients(grads)

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        """Sums gradients over replicas (TensorFlow only), unless clipping needed the sums."""
        if self._clips_whole_gradients():
            return list(grads_and_vars)
        return super()._all_reduce_sum_gradients(grads_and_vars)

    def _weight_decay_of(self, variable: Any) -> float | None:
        return self.weight_decay

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        decays = [self._weight_decay_of(variable) for variable in variables]
        if any(decays):
            _compat.decay(self, variables, decays, self._multipliers_of(variables))

    def _backend_update_step(
        self, grads: Sequence[Any], variables: Sequence[Any], learning_rate: Any
    ) -> None:
        step = super()._backend_update_step
        if not self._scales_backend_step:
            step(grads, variables, learning_rate)
            return
        multipliers = self._multipliers_of(variables)
        for multiplier in dict.fromkeys(multipliers):
            chosen = [i for i, value in enumerate(multipliers) if value == multiplier]
            step(
                [grads[i] for i in chosen],
                [variables[i] for i in chosen],
                _compat.scaled_rate(learning_rate, multiplier),
            )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable at its own rate."""
        step = super().update_step
        if self._scales_backend_step:
            step(gradient, variable, learning_rate)
            return
        (multiplier,) = self._multipliers_of([variable])
        rate = _compat.scaled_rate(learning_rate, multiplier)
        if not _compat.is_low_precision(variable):
            step(gradient, variable, rate)
            return
        copy = _compat.Float32Copy(variable)
        step(gradient, copy, rate)
        copy.write_back()

    def _parallel_update_step(
        self, grads: Sequence[Any], variables: Sequence[Any], learning_rate: Any
    ) -> None:
        """Updates all variables in one list kernel a multiplier (torch only)."""
        groups = _compat.torch_groups(variables, self._multipliers_of(variables))
        advanced = [getattr(self, name) for name in self._advanced_once]
        before = [keras.ops.copy(variable) for variable in advanced]
        multipliers = [multiplier for multiplier, _, _ in groups]
        rates = _compat.torch_scaled_rates(learning_rate, multipliers)
        shared: dict[Any, Any] = {"rates": rates}
        for number, ((_, dtype, _), chosen) in enumerate(groups.items()):
            if number:
                for variable, value in zip(advanced, before, strict=True):
                    variable.assign(value)
            step_dtype = _compat.torch_step_dtype(dtype)
            group = [variables[i] for i in chosen]
            if dtype != step_dtype:
                group = [_compat.Float32Copy(variable) for variable in group]
            group_grads = _compat.torch_matching_gradients([grads[i] for i in chosen], step_dtype)
            self._list_step(group_grads, group, rates[number], shared)
            if dtype != step_dtype:
                _compat.torch_write_back(group)

    def _list_step(
        self, grads: Sequence[Any], variables: Sequence[Any], rate: Any, shared: dict[Any, Any]
    ) -> None:
        """Updates them; `shared` is a place for what the groups of one step have in common."""
        super()._parallel_update_step(grads, variables, rate)

    # --- low-precision variables ---

    def _var_key(self, variable: Any) -> Any:
        # Asked for hundreds of times a step.
        if type(variable) is _compat.Float32Copy:
            variable = variable.original
        return super()._var_key(variable)

    def assign(self, variable: Any, value: Any) -> None:
        """Assigns a value, as in Keras."""
        if isinstance(variable, _compat.Float32Copy):
            variable.assign(value)
        else:
            super().assign(variable, value)

    def assign_add(self, variable: Any, value: Any) -> None:
        """Adds a value, as in Keras."""
        if isinstance(variable, _compat.Float32Copy):
            variable.assign_add(value)
        else:
            super().assign_add(variable, value)

    def assign_sub(self, variable: Any, value: Any) -> None:
        """Subtracts a value, as in Keras."""
        if isinstance(variable, _compat.Float32Copy):
            variable.assign_sub(value)
        else:
            super().assign_sub(variable, value)

    def _update_model_variables_moving_average(self, trainable_variables: Sequence[Any]) -> None:
        if self._loraplus.has_low_precision:
            trainable_variables = [
                _compat.Float32Copy(variable) if _compat.is_low_precision(variable) else variable
                for variable in trainable_variables
            ]
        super()._update_model_variables_moving_average(trainable_variables)

    def _overwrite_model_variables_with_average_value(
        self, trainable_variables: Sequence[Any]
    ) -> None:
        averages = self._model_variables_moving_average
        # Keras's own step on JAX (3.15.1) makes both variables hold one buffer, which the next
        # `fit` donates twice: it fails and the weights are gone.
        shares_buffers = keras.backend.backend() == "jax"
        if not self._loraplus.has_low_precision and not shares_buffers:
            super()._overwrite_model_variables_with_average_value(trainable_variables)
            return
        for variable, average in zip(trainable_variables, averages, strict=True):
            if average is not None:
                self.assign(variable, keras.ops.copy(average))
