"""Gives a built Keras layer an adapter in place, and takes it away again.

Keras models hold their layers in graphs, attributes and lists, so a replaced layer object would be
missed somewhere. The layer therefore stays the same object and changes its class, to one that

- has the former class's `__name__`, because weight files key layers by it;
- is registered for loading under one name of its own, with the former class in its config;
- stands in front of the former class, so that a user's own `call` still runs and reaches the
  adapter where it says `super().call(...)`.
"""

import functools
import importlib
import inspect
import weakref
from typing import Any

import keras

from keras_loraplus import _compat
from keras_loraplus.layers.adapter_types import lora_class_for, registered_names, type_of
from keras_loraplus.layers.base import LowRankLayer
from keras_loraplus.layers.spec import AdapterSpec

# Overriding one of these changes what the kernel means, so that W + s A B is not what a merged
# layer would compute.
_KERNEL_HOOKS = ("kernel", "embeddings", "convolution_op")

_REGISTERED = "AdoptedLayer"

# Factors of merged layers. A function that TensorFlow traced before the merge reads them by handle,
# with a scale of 0; without an owner they would be freed under it.
_RETIRED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def why_not_adoptable(layer):
    """Returns why a layer cannot be given an adapter, or None if it can.

    Args:
        layer: A Keras layer.

    Returns:
        A short text, or None.
    """
    layer_class = type(layer)
    if isinstance(layer, LowRankLayer):
        return "it already has a LoRA+ adapter"
    lora_class = lora_class_for(layer_class)
    if lora_class is None:
        return why_without_adapter(layer_class)
    if not layer.built:
        return "it is not built"
    reason = lora_class.why_not_adaptable(layer)
    return reason or _why_call_not_decomposable(layer, lora_class)


def why_without_adapter(layer_class):
    """Returns why layers of a class that no adapter is registered for have none."""
    found = type_of(layer_class)
    if found is not None and found.reason is not None:
        return f"no adapter exists for a {layer_class.__name__}: {found.reason}"
    return f"{layer_class.__name__} is not a layer type that adapters exist for"


def _why_call_not_decomposable(layer, lora_class):
    layer_class, plain_class = type(layer), lora_class.plain_class
    for hook in _KERNEL_HOOKS:
        if getattr(layer_class, hook, None) is not getattr(plain_class, hook, None):
            return f"{layer_class.__name__} overrides `{hook}`"
    if layer_class.call is plain_class.call:
        return None
    name = layer_class.__name__
    advice = f"`{name}.call` must compute the product through `super().call(...)`"
    try:
        reached, bypassed = _probe_call(layer, plain_class, lora_class.matrix_attributes())
    except Exception as error:  # a user's call may fail on symbolic inputs in any way
        return f"{advice}, and could not be traced: {type(error).__name__}: {error}"
    if bypassed:
        return f"{advice}, but it reads the kernel itself"
    return None if reached else f"{advice}, but it does not"


def _probe_call(layer, plain_class, attributes):
    """Traces a user's `call`; returns whether it reaches the plain one, and goes round it."""
    seen = {"reached": False, "bypassed": False, "inside": False}

    class Probe(plain_class):  # type: ignore[valid-type, misc]
        def call(self, *args, **kwargs):
            seen["reached"] = seen["inside"] = True
            try:
                return super().call(*args, **kwargs)
            finally:
                seen["inside"] = False

    def watched(attribute):
        def read(self):
            if not seen["inside"]:
                seen["bypassed"] = True
            if hasattr(plain_class, attribute):
                return getattr(plain_class, attribute).__get__(self)
            return vars(self)[attribute]

        return property(read)

    for attribute in attributes:
        setattr(Probe, attribute, watched(attribute))
    layer_class = type(layer)
    takes_tokens = issubclass(plain_class, keras.layers.Embedding)
    arguments = _symbolic_arguments(layer, "int32" if takes_tokens else None)
    layer.__class__ = type(layer_class.__name__, (layer_class, Probe), {})
    try:
        _compat.trace(layer.call, **arguments)
    finally:
        layer.__class__ = layer_class
    return seen["reached"], seen["bypassed"]


def _symbolic_arguments(layer, dtype):
    """Returns symbolic values for what a built layer's `call` requires."""
    shapes = dict(_compat.build_shapes(layer) or {})
    first, *others = inspect.signature(layer.call).parameters.values()
    shape = next(iter(shapes.values()), None) or (None, None)
    arguments = {first.name: keras.KerasTensor(shape, dtype=dtype or layer.compute_dtype)}
    for parameter in others:
        shape = shapes.get(f"{parameter.name}_shape")
        if parameter.name == "training":
            arguments["training"] = False
        elif shape is not None:
            arguments[parameter.name] = keras.KerasTensor(shape, dtype=layer.compute_dtype)
    return arguments


def adopted_class(layer_class):
    """Returns the class that a layer of `layer_class` has while it carries an adapter."""
    return _adopted_class(layer_class, lora_class_for(layer_class))


@functools.cache
def _adopted_class(layer_class, lora_class):
    own_call = layer_class.call is not lora_class.plain_class.call
    bases = (lora_class,) if layer_class is lora_class.plain_class else (layer_class, lora_class)
    body = {
        "__init__": _adopted_init,
        "__doc__": f"{layer_class.__name__} with a LoRA+ adapter.",
        "__module__": __name__,
        "get_config": _adopted_get_config,
        "plain_class": layer_class,
        "_is_adopted": True,
    }
    adopted: Any = type(layer_class.__name__, bases, body)
    for method in ("enable_lora", "quantize"):
        # A user's class may override these; the adapter's refusals come first.
        setattr(adopted, method, getattr(lora_class, method))
    if own_call and "training" not in inspect.signature(layer_class.call).parameters:
        adopted.call = _call_that_takes_training(adopted, layer_class.call)
    keras.saving.register_keras_serializable("keras_loraplus", _REGISTERED)(adopted)
    # The name belongs to the loader; the line above only made this class serialise under it.
    keras.saving.register_keras_serializable("keras_loraplus", _REGISTERED)(AdoptedLayer)
    return adopted


def _adopted_init(self, *args, lora_plus=None, **kwargs):
    adopted = type(self)
    self.__dict__["_adapter"] = AdapterSpec.from_config(lora_plus["adapter"])
    self.__dict__["_frozen_names"] = tuple(lora_plus["frozen"])
    super(adopted, self).__init__(*args, **kwargs)


def _adopted_get_config(self):
    adopted = type(self)
    base = adopted.plain_class
    config = {**_compat.automatic_config(self, base), **super(adopted, self).get_config()}
    config["lora_plus"] = {
        "adapter": self.adapter.get_config(),
        "frozen": list(self.frozen_names()),
        "class_name": base.__name__,
        "module": base.__module__,
        "registered_name": keras.saving.get_registered_name(base),
    }
    return config


def _call_that_takes_training(adopted, call):
    """Adds a `training` argument to a user's `call`, for the adapter's dropout.

    A functional model hands `training` only to layers whose `call` names it.
    """
    signature = inspect.signature(call)
    parameters = list(signature.parameters.values())
    extra = inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = len(parameters)
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        at -= 1
    parameters.insert(at, extra)

    @functools.wraps(call)
    def call_with_training(self, *args, training=None, **kwargs):
        outer = self.__dict__.get("_lora_training")
        self.__dict__["_lora_training"] = training
        try:
            return super(adopted, self).call(*args, **kwargs)
        finally:
            self.__dict__["_lora_training"] = outer

    wrapped: Any = call_with_training
    wrapped.__signature__ = signature.replace(parameters=parameters)
    return wrapped


@keras.saving.register_keras_serializable("keras_loraplus", _REGISTERED)
class AdoptedLayer(keras.layers.Layer):
    """Loads layers that were saved with an adapter; never an instance's class itself."""

    @classmethod
    def from_config(cls, config):
        """Rebuilds an adopted layer of the class that its config names.

        Raises:
            ValueError: If that class cannot be found or is not a layer that adapters exist for.
        """
        saved = config["lora_plus"]
        layer_class = keras.saving.get_registered_object(saved["registered_name"])
        if layer_class is None:
            try:
                layer_class = getattr(importlib.import_module(saved["module"]), saved["class_name"])
            except (ImportError, AttributeError):
                layer_class = None
        if not isinstance(layer_class, type) or lora_class_for(layer_class) is None:
            raise ValueError(
                f"Expected the class '{saved['class_name']}' of an adapted layer (module "
                f"'{saved['module']}', registered as '{saved['registered_name']}') and an adapter "
                f"for it; {'the class' if layer_class is None else 'the adapter'} was not found. "
                "Before loading, import the module that defines the class, or register it with "
                "`keras.saving.register_keras_serializable`, and its own adapter with "
                "`keras_loraplus.register_adapter`."
            )
        return adopted_class(layer_class).from_config(config)


def adopt(layer, spec):
    """Gives a built Keras layer an adapter, in place.

    Args:
        layer: A built layer of a supported class.
        spec: The `AdapterSpec`.

    Returns:
        The same layer.

    Raises:
        ValueError: If the layer cannot have an adapter; it is unchanged.
    """
    reason = why_not_adoptable(layer)
    if reason:
        raise ValueError(
            f"Layer '{layer.path or layer.name}' cannot have an adapter: {reason}. Layers with "
            f"adapters: {registered_names()}, built, and "
            "subclasses whose `call` delegates to `super().call(...)`."
        )
    _compat.check_distribution(layer)
    layer_class: Any = type(layer)
    before = _compat.tracked_state(layer)
    layer.__class__ = adopted_class(layer_class)
    layer.__dict__["_adapter"] = spec
    layer.__dict__["_before_adoption"] = before
    try:
        with _compat.unlocked(layer):
            if not layer.trainable:
                # The layer has to train A and B; what else it holds stays as frozen as it was.
                _compat.freeze_variables(layer, _compat.own_variables(layer))
                _compat.own_trainable_flag(layer, True)
            with _compat.path_scope(layer):
                layer._build_adapter()
    except BaseException:
        release(layer)
        raise
    _compat.refresh_class_bindings(layer)
    return layer


def release(layer):
    """Takes the adapter off a layer: its class, variables and flags are those from before.

    Args:
        layer: A layer with an adapter.

    Returns:
        The same layer.
    """
    if hasattr(layer, "lora_scaling"):
        layer.lora_scaling.assign(0.0)
    factors = [name for pair in layer._factors() for name in (pair.a, pair.b)]
    retired = [
        _compat.drop_attribute(layer, name)
        for name in (*factors, "lora_scaling", "lora_seed_generator")
        if hasattr(layer, name)
    ]
    # A quantized kernel never trains; torch would refuse integers that do.
    frozen = [] if layer.quantization_mode is not None else layer._kernels()
    names = layer.frozen_names()
    frozen += [variable for variable in _compat.own_variables(layer) if variable.name in names]
    before = layer.__dict__.pop("_before_adoption", None)
    layer.__dict__.pop("_adapter", None)
    layer.__dict__.pop("_frozen_names", None)
    plain_names = layer.__dict__.pop("_plain_names", ())
    layer.__class__ = type(layer).plain_class
    if before is not None:
        _compat.restore_tracked_state(layer, before)
    else:
        # Loaded or made with its adapter: there was no time before it.
        _compat.thaw_variables(layer, frozen)
        _compat.order_own_variables(layer, plain_names)
    _compat.refresh_class_bindings(layer)
    _RETIRED.pop(layer, None)
    retire(layer, retired)
    return layer


def retire(layer, variables):
    """Keeps variables that the layer has lost alive as long as the layer is."""
    _RETIRED.setdefault(layer, []).extend(variables)
