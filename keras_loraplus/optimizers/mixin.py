"""What every LoRA+ optimizer adds to the Keras optimizer it derives from."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_loraplus import _compat
from keras_loraplus.optimizers import early_state
from keras_loraplus.optimizers.assignments import Assignment, Assignments
from keras_loraplus.optimizers.multipliers import (
    Multiplier,
    Settings,
    plan_from_record,
    plan_multipliers,
    shorten,
)
from keras_loraplus.optimizers.steps import StepMixin


class _State:
    """LoRA+ state of one optimizer.

    It is one object that Keras and TensorFlow do not look into: both replace lists and dictionaries
    assigned to an optimizer by tracking wrappers, which are neither plain JSON nor indexable by
    position while a graph is traced.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.table: list[Multiplier] = []
        self.multipliers: list[float] = []
        self.has_low_precision = False
        self.in_apply = False
        # Why the next training step would fail, said when it asks for the optimizer's variables.
        self.refusal: str | None = None
        # What `exclude_from_weight_decay` was given.
        self.excluded_names: list[str] = []
        self.excluded_variables: list[Any] = []
        # From a saved config, until `build`: excluded paths, and a row for every variable.
        self.excluded_paths: list[str] = []
        self.record: list[dict[str, Any]] | None = None
        # Loaded from a file before `build`, which applies it.
        self.early: early_state.EarlyState | None = None


def path_of(variable: Any) -> str:
    """Returns the path of a variable, or its name where it has none (a bare `tf.Variable`)."""
    return getattr(variable, "path", variable.name)


class LoRAPlusMixin(StepMixin):
    """Learning-rate multipliers for a Keras optimizer, decided once in `build`.

    Args:
        *args: Positional arguments of the Keras optimizer.
        lr_ratio: Rate of B over the rate of A.
        lr_multipliers: Variable path or regular expression -> factor, or None.
        embedding_lr_multiplier: Factor on both sides of adapted embeddings.
        **kwargs: Arguments of the Keras optimizer.

    It stands before the Keras class in the order of resolution; `StepMixin` is the part that acts
    in a step.
    """

    def __init__(
        self,
        *args: Any,
        lr_ratio: float = 16.0,
        lr_multipliers: dict[str, float] | None = None,
        embedding_lr_multiplier: float = 1.0,
        **kwargs: Any,
    ) -> None:
        settings = Settings(lr_ratio, lr_multipliers, embedding_lr_multiplier)
        if kwargs.get("name") is None:
            # Keras would turn the class name into `lo_ra_plus_...`.
            kwargs["name"] = type(self).__name__.lower()
        super().__init__(*args, **kwargs)
        self._loraplus = _State(settings)

    # --- arguments and config ---

    @property
    def lr_ratio(self) -> float:
        """Rate of B over the rate of A."""
        return self._loraplus.settings.lr_ratio

    @property
    def lr_multipliers(self) -> dict[str, float]:
        """Variable path or regular expression -> factor."""
        return dict(self._loraplus.settings.lr_multipliers or {})

    @property
    def embedding_lr_multiplier(self) -> float:
        """Factor on both sides of adapted embeddings."""
        return self._loraplus.settings.embedding_lr_multiplier

    def get_config(self) -> dict[str, Any]:
        """Returns the Keras optimizer's config, the LoRA+ arguments and the decay exclusions."""
        config = super().get_config()
        config["lr_ratio"] = self.lr_ratio
        config["lr_multipliers"] = self.lr_multipliers
        config["embedding_lr_multiplier"] = self.embedding_lr_multiplier
        state = self._loraplus
        paths = state.excluded_paths + [path_of(v) for v in state.excluded_variables if v.trainable]
        if state.excluded_names or paths:
            config["exclude_from_weight_decay"] = {
                "var_names": state.excluded_names,
                "paths": paths,
            }
        if self.lr_multipliers or paths:
            record = self._make_record() if self._is_built else state.record
            if record is not None:
                config["built_on"] = record
        return config

    def _make_record(self) -> list[dict[str, Any]]:
        """Returns what is needed to find every variable's rate and exclusion by its position."""
        excluded = {self._var_key(variable) for variable in self._loraplus.excluded_variables}
        return [
            {
                "path": row.path,
                "shape": list(variable.shape),
                "pattern": row.pattern,
                "excluded": self._var_key(variable) in excluded,
            }
            for variable, row in zip(self._trainable_variables, self._loraplus.table, strict=True)
        ]

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Returns an optimizer with this config, decay exclusions included."""
        config = dict(config)
        excluded = config.pop("exclude_from_weight_decay", None)
        record = config.pop("built_on", None)
        optimizer = super().from_config(config, custom_objects)
        if excluded:
            optimizer.exclude_from_weight_decay(var_names=excluded["var_names"])
            optimizer._loraplus.excluded_paths = list(excluded["paths"])
        optimizer._loraplus.record = record
        return optimizer

    def exclude_from_weight_decay(
        self, var_list: Sequence[Any] | None = None, var_names: Sequence[str] | None = None
    ) -> None:
        """Excludes variables from weight decay, as in Keras, and remembers them for the config.

        Args:
            var_list: Variables to exclude. The config keeps their paths.
            var_names: Strings; a variable whose name contains one is excluded.
        """
        super().exclude_from_weight_decay(var_list, var_names)
        self._loraplus.excluded_names = list(var_names or [])
        self._loraplus.excluded_variables = list(var_list or [])
        self._loraplus.excluded_paths = []

    # --- build ---

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the optimizer's state and decides every variable's multiplier.

        Calling it again with the same variables, or some of them, does nothing.

        Args:
            variables: Trainable variables.

        Raises:
            ValueError: A pattern of `lr_multipliers` matches no variable, two match the same one,
                or the optimizer has been built on other variables; or a state that was loaded
                before does not fit. Nothing has been changed.
        """
        variables = list(variables)
        if self._is_built:
            reason = self._reason_against(variables)
            if self._is_stale():
                # Keras's trainers are asking, also those that only evaluate, which needs no
                # optimizer. Training is refused where it begins.
                self._loraplus.refusal = reason
            elif reason:
                raise ValueError(reason)
            return
        state = self._loraplus
        table = self._plan(variables)
        self._resolve_excluded_paths(variables)
        before = len(self._variables)
        super().build(variables)
        state.table = table
        state.multipliers = [row.value for row in table]
        state.has_low_precision = any(_compat.is_low_precision(v) for v in variables)
        for name in self._advanced_once:
            self._widen(name)
        if state.early is not None:
            self._apply_early_state(state.early, before)

    def _apply_early_state(self, early: early_state.EarlyState, before: int) -> None:
        try:
            early_state.apply(self, self._variables, early)
        except ValueError:
            # Unbuilt again, with the state still waiting: a second attempt must not train without.
            for variable in self._variables[before:]:
                self._untrack_variable(variable)
            self._trainable_variables.clear()
            self._trainable_variables_indices.clear()
            self._is_built = False
            raise
        self._loraplus.early = None

    @property
    def built(self) -> bool:
        """Whether the optimizer has its state for what the model trains now.

        False again once a variable that it was built on has been frozen or merged away: Keras's
        trainers then call `build`, which finds variables it does not know. Without that the JAX
        trainer would fail while tracing, when it has already taken the values out of the model.
        """
        if not self._is_built or self._loraplus.in_apply:
            return self._is_built
        return not self._is_stale()

    @built.setter
    def built(self, value: bool) -> None:
        self._is_built = value

    def _is_stale(self) -> bool:
        return not all(variable.trainable for variable in self._trainable_variables)

    @property
    def variables(self) -> list[Any]:
        """The optimizer's variables.

        Raises:
            ValueError: On JAX, once, where training begins with variables that the optimizer was
                not built on: Keras's trainer asks here, before it takes the values out of the
                model. On TensorFlow and torch `apply` refuses.
        """
        state = self.__dict__.get("_loraplus")
        if state is not None and state.refusal and keras.backend.backend() == "jax":
            reason, state.refusal = state.refusal, None
            raise ValueError(reason)
        return super().variables

    def save_own_variables(self, store: Any) -> None:
        """Saves the state, also of an optimizer that the model has left behind."""
        state = self._loraplus
        state.refusal = None
        if state.early is not None:
            early_state.store_unbuilt(self._variables, state.early, store)
        else:
            super().save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Loads the state; before `build`, keeps what it has no variables for until then.

        Args:
            store: Dict-like of arrays under `"0"`, `"1"`, ...

        Raises:
            ValueError: If a shape differs, or, before `build`, even the iteration and the learning
                rate are not there. The optimizer is unchanged.
        """
        state = self._loraplus
        state.refusal = None
        if self._is_built:
            early_state.check_shapes(self, self._variables, store)
            super().load_own_variables(store)
        elif len(store.keys()):
            wrapper = (state.early.wrapper, state.early.wrapper_arrays) if state.early else ()
            state.early = early_state.take(self, self._variables, store)
            if state.early is not None and wrapper:
                state.early.wrapper, state.early.wrapper_arrays = wrapper

    def load_wrapped_state(self, store: Any, wrapper: Any, arrays: tuple) -> None:
        """Loads the state before `build`, and keeps that of the `LossScaleOptimizer` around it.

        Args:
            store: Dict-like of arrays under `"0"`, `"1"`, ...
            wrapper: The `LossScaleOptimizer`, unbuilt.
            arrays: Its step counter and scale.
        """
        state = self._loraplus
        state.early = early_state.take(self, self._variables, store)
        if state.early is not None:
            state.early.wrapper, state.early.wrapper_arrays = wrapper, arrays

    def _reason_against(self, variables: Sequence[Any]) -> str | None:
        known = self._trainable_variables_indices
        unknown = [path_of(v) for v in variables if self._var_key(v) not in known]
        # Keras's JAX trainer passes state by position and cannot leave a variable out.
        missing = keras.backend.backend() == "jax" and len(variables) < len(known)
        if unknown or missing:
            built_on = shorten([path_of(v) for v in self._trainable_variables])
            received = (
                f"variables it does not know: {shorten(unknown)}"
                if unknown
                else f"only {len(variables)} of them: {shorten([path_of(v) for v in variables])}"
            )
            return (
                f"This {type(self).__name__} can only train the variables that it was built on: "
                f"{built_on}. Received {received}. What is trainable has changed since; create a "
                "new optimizer and call `model.compile` with it. Nothing has been changed."
            )
        return None

    def _refuse_other_variables(self, variables: Sequence[Any]) -> None:
        reason = self._reason_against(variables)
        if reason:
            raise ValueError(reason)

    def _check_variables_are_known(self, variables: Sequence[Any]) -> None:
        known = self._trainable_variables_indices
        if self._are_all(variables):
            return
        if any(self._var_key(variable) not in known for variable in variables):
            self._refuse_other_variables(variables)

    def _plan(self, variables: Sequence[Any]) -> list[Multiplier]:
        state = self._loraplus
        paths = [path_of(variable) for variable in variables]
        shapes = [tuple(variable.shape) for variable in variables]
        recorded = plan_from_record(state.record, paths, shapes, state.settings)
        return recorded or plan_multipliers(paths, state.settings)

    def _resolve_excluded_paths(self, variables: Sequence[Any]) -> None:
        """Turns the exclusions of a restored config back into variables."""
        state = self._loraplus
        if not state.excluded_paths:
            return
        paths = [path_of(variable) for variable in variables]
        shapes = [tuple(variable.shape) for variable in variables]
        if state.record and plan_from_record(state.record, paths, shapes, state.settings):
            chosen = [bool(row["excluded"]) for row in state.record]
        else:
            chosen = [path in state.excluded_paths for path in paths]
            lost = sorted(set(state.excluded_paths) - set(paths))
            if lost:
                raise ValueError(
                    "The config excludes variables from weight decay that are not among the "
                    f"trainable ones: {lost}; trainable are {shorten(paths)}. Call "
                    "`optimizer.exclude_from_weight_decay(...)` again before training."
                )
        excluded = [v for v, chosen_one in zip(variables, chosen, strict=True) if chosen_one]
        self.exclude_from_weight_decay(excluded, state.excluded_names)

    def add_variable(
        self, shape: Any, initializer: Any = "zeros", dtype: Any = None, **kwargs: Any
    ) -> Any:
        """Adds an optimizer variable; moments of a low-precision variable are float32."""
        dtype = keras.backend.standardize_dtype(dtype or keras.config.floatx())
        if dtype in _compat.LOW_PRECISION:
            dtype = "float32"
        return super().add_variable(shape, initializer, dtype, **kwargs)

    def _widen(self, name: str) -> None:
        """Makes a scalar that Keras created in the dtype of the first variable float32."""
        variable = getattr(self, name)
        if _compat.is_low_precision(variable):
            self._untrack_variable(variable)
            setattr(self, name, self.add_variable((), "ones", "float32", name=name.strip("_")))

    # --- assignments ---

    def assignments(self, variables: Sequence[Any] | None = None) -> Assignments:
        """Tells at which rate each variable trains now.

        Args:
            variables: Variables to plan for before `build`; None for those it was built on.

        Returns:
            A list of records with `path`, `role`, `shape`, `multiplier`, `learning_rate` and
            `pattern`; printing it gives a table.

        Raises:
            ValueError: The optimizer is not built and no variables are given.
        """
        state = self._loraplus
        if self._is_built:
            if variables is not None:
                self._refuse_other_variables(variables)
            variables, table = self._trainable_variables, state.table
        elif variables is None:
            raise ValueError(
                "Expected an optimizer that has been built. This one knows no variables yet; "
                "call `optimizer.build(model.trainable_variables)`, or use "
                "`keras_loraplus.assignments(model)` on the compiled model."
            )
        else:
            table = self._plan(variables)
        rate = float(keras.ops.convert_to_numpy(self.learning_rate))
        return Assignments(
            Assignment(
                path=row.path,
                role=row.role,
                shape=tuple(variable.shape),
                multiplier=row.value,
                learning_rate=rate * row.value,
                pattern=row.pattern,
            )
            for variable, row in zip(variables, table, strict=True)
        )
