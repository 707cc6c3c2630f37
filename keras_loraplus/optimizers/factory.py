"""LoRA+ versions of Keras optimizers."""

from typing import Any

import keras

from keras_loraplus import _compat
from keras_loraplus.optimizers.mixin import LoRAPlusMixin

_PACKAGE = "keras_loraplus"

# Optimizers whose step is linear in the learning rate, each tested against its stock class.
LINEAR = (
    "AdamW",
    "Adam",
    "SGD",
    "RMSprop",
    "Lion",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "Lamb",
    "Muon",
    "Nadam",
)

# Optimizers for which a multiplied rate does not mean a multiplied step, and why.
REFUSED = {
    "ScheduleFreeAdamW": "it averages its iterates with weights made from the learning rate, so "
    "that the rate is not a factor of the step",
    "Ftrl": "it solves for the weights from accumulated sums in which the learning rate appears "
    "non-linearly",
    "Adafactor": "with `relative_step` (its default) it caps the learning rate at 1/sqrt(step) and "
    "scales it by the weights, so that it adapts the rate itself",
    "MultiOptimizer": "it has no learning rate of its own; give it LoRA+ optimizers as parts",
    "LossScaleOptimizer": "it only wraps an optimizer; wrap the LoRA+ optimizer inside it: "
    "`LossScaleOptimizer(LoRAPlusAdamW(...))`",
}

_ARGUMENTS = """

    Args:
        *args: Positional arguments of `keras.optimizers.{stock}`.
        lr_ratio: Learning rate of B over that of A. Defaults to 16.
        lr_multipliers: Dictionary of variable path or regular expression -> factor on the rate of
            what it matches (exactly, else by `re.fullmatch`), or None.
        embedding_lr_multiplier: Factor on both sides of adapted embeddings. Defaults to 1.
        **kwargs: Arguments of `keras.optimizers.{stock}`.

    Raises:
        ValueError: A number is not positive and finite, a pattern is not a regular expression; in
            `build`, a pattern matches nothing or two match one variable.
    """


class _MuonDecay:
    """Muon decays what it leaves to Adam by a factor of its own."""

    def _weight_decay_of(self, variable: Any) -> float | None:
        if self._should_use_adamw(variable):  # type: ignore[attr-defined]
            return self.adam_weight_decay  # type: ignore[attr-defined]
        return self.weight_decay  # type: ignore[attr-defined]


class FusedAdamStep:
    """Takes Adam's step on torch in one fused kernel, where that computes the same."""

    def _list_step(self, grads: Any, variables: Any, rate: Any, shared: dict) -> None:
        if not self.amsgrad:  # type: ignore[attr-defined]
            indices = [self._get_variable_index(v) for v in variables]  # type: ignore[attr-defined]
            slots = [(self._momentums[i], self._velocities[i]) for i in indices]  # type: ignore[attr-defined]
            if _compat.torch_fused_adam(self, grads, variables, rate, slots, shared):
                return
        super()._list_step(grads, variables, rate, shared)  # type: ignore[misc]


_EXTRAS: dict[str, tuple[type, ...]] = {
    "Adam": (FusedAdamStep,),
    "AdamW": (FusedAdamStep,),
    "Muon": (_MuonDecay,),
}
_ADVANCED_ONCE = {"Nadam": ("_u_product",)}

_made: dict[type, type] = {}


def bases_of(name: str) -> tuple[type, ...]:
    """Returns the base classes of the LoRA+ version of a listed Keras optimizer."""
    stock = getattr(keras.optimizers, name)
    return (*_EXTRAS.get(name, ()), LoRAPlusMixin, _compat.active_optimizer_class(stock))


def remember(stock: type, made: type) -> type:
    """Makes `loraplus` return this class for this Keras optimizer."""
    _made[stock] = made
    _made[_compat.active_optimizer_class(stock)] = made
    _made[made] = made
    return made


def loraplus(optimizer_class: type, *, assume_linear: bool = False) -> type:
    """Returns the LoRA+ version of a Keras optimizer class.

    The class returned is a subclass that takes the same arguments, `lr_ratio`, `lr_multipliers` and
    `embedding_lr_multiplier`, and trains the B side of every low-rank adapter at `lr_ratio` times
    the rate of the A side. That is right only for optimizers whose step is proportional to their
    learning rate, so it is offered for those that have been tested: Adadelta, Adagrad, Adam,
    Adamax, AdamW, Lamb, Lion, Muon, Nadam, RMSprop and SGD.

    Args:
        optimizer_class: A Keras optimizer class. `AdamW` gives `LoRAPlusAdamW`.
        assume_linear: Set it for a class of your own whose step is proportional to the learning
            rate that its `update_step` receives. If it overrides `_backend_update_step`, that must
            give the same when called for one group of variables after the other. The class returned
            is registered for loading by this call, so a new process makes the same call before
            `keras.models.load_model`.

    Returns:
        The subclass, always the same one for the same class.

    Raises:
        ValueError: Not an optimizer class; one whose step is not proportional to its rate; or an
            unknown one without `assume_linear=True`.

    Reference:
        [LoRA+: Efficient Low Rank Adaptation of Large Models](https://arxiv.org/abs/2402.12354)

    Example:
    >>> import keras, keras_loraplus as klp
    >>> optimizer = klp.loraplus(keras.optimizers.Lion)(1e-4, lr_ratio=8.0)
    >>> type(optimizer).__name__
    'LoRAPlusLion'
    """
    if not isinstance(optimizer_class, type) or not issubclass(
        optimizer_class, keras.optimizers.Optimizer
    ):
        raise ValueError(
            "Expected an optimizer class, for example `loraplus(keras.optimizers.Lion)`. Received: "
            f"{optimizer_class!r}"
        )
    if optimizer_class in _made:
        return _made[optimizer_class]
    if issubclass(optimizer_class, LoRAPlusMixin):
        return optimizer_class
    for name, reason in REFUSED.items():
        stock = getattr(keras.optimizers, name, None)
        if stock is not None and issubclass(optimizer_class, stock):
            raise ValueError(
                f"There is no LoRA+ version of {optimizer_class.__name__}: {reason}. "
                f"Optimizers that have one: {', '.join(LINEAR)}."
            )
    if not assume_linear:
        raise ValueError(
            f"{optimizer_class.__name__} is not an optimizer that LoRA+ has been tested with: "
            f"{', '.join(LINEAR)}. If its step is proportional to its learning rate, say so: "
            f"`loraplus({optimizer_class.__name__}, assume_linear=True)`."
        )
    return _make_own(optimizer_class)


def _make_own(optimizer_class: type) -> type:
    name = optimizer_class.__name__
    if _compat.defined_outside_keras(optimizer_class, "_apply_weight_decay"):
        raise ValueError(
            f"There is no LoRA+ version of {name}: it overrides `_apply_weight_decay`, and decay "
            "at each variable's own rate would bypass that. Pass Keras's `weight_decay` and "
            "`exclude_from_weight_decay` instead."
        )
    attributes = {
        "__module__": optimizer_class.__module__,
        "__doc__": f"LoRA+ version of {name}.{_ARGUMENTS.format(stock=name)}",
        "_scales_backend_step": _compat.defined_outside_keras(
            optimizer_class, "_backend_update_step"
        ),
    }
    active = _compat.active_optimizer_class(optimizer_class)
    made = type(f"LoRAPlus{name}", (LoRAPlusMixin, active), attributes)
    registered = f"{optimizer_class.__module__}.{optimizer_class.__qualname__}"
    keras.saving.register_keras_serializable(_PACKAGE, f"LoRAPlus[{registered}]")(made)
    return remember(optimizer_class, made)


def _make_listed(name: str) -> type:
    attributes = {
        "__module__": __name__,
        "__doc__": f"LoRA+ version of `keras.optimizers.{name}`.{_ARGUMENTS.format(stock=name)}",
        "_advanced_once": _ADVANCED_ONCE.get(name, ()),
    }
    made = type(f"LoRAPlus{name}", bases_of(name), attributes)
    keras.saving.register_keras_serializable(_PACKAGE)(made)
    return remember(getattr(keras.optimizers, name), made)


# All at import, so that a saved model loads where nothing but `import keras_loraplus` has run.
# AdamW has a module of its own.
for _name in LINEAR:
    if _name != "AdamW":
        globals()[f"LoRAPlus{_name}"] = _make_listed(_name)
