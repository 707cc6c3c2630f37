"""A Keras layer as an object: its methods, its class, how it is called and built."""

import contextlib
import inspect
import types

from keras.src.backend.common import global_state, masking  # private: checked on 3.15.1

from keras_loraplus._compat.variables import unlocked

_BOOKKEEPING = frozenset(
    {
        "_compiled_trainable_state",
        "_functional",
        "_inbound_nodes",
        "_layers",
        "_metrics",
        "_modules",
        "_nodes",
        "_operations",
        "_operations_by_depth",
        "_operations_by_name",
        "_outbound_nodes",
        "_torch_params",
    }
)


def flatten_layers(model):
    """Returns the layer and every layer below it, each once.

    `Layer._flatten_layers` (3.15.1): the public `Model.layers` stops at the first level, and misses
    what composite layers hold as attributes.
    """
    return model._flatten_layers()


def refresh_class_bindings(layer):
    """Rebinds what a Keras layer caches of its class in `__new__` and `__init__`.

    `Layer.__new__` (3.15.1) wraps `build` and `quantize` of the class of that moment into instance
    attributes, and `Layer.__init__` caches the signature of `call`. After `layer.__class__` has
    changed both would still be those of the former class. 3.16.0.dev2026102704 wraps `build` alone.
    """
    for name, wrapped in (("build", _wrapped_build), ("quantize", _wrapped_quantize)):
        if layer.__dict__.pop(name, None) is not None:
            layer.__dict__[name] = wrapped(layer, getattr(layer, name))
    layer._call_signature = inspect.signature(layer.call)
    names = [parameter.name for parameter in layer._call_signature.parameters.values()]
    layer.call_signature_parameters = names
    layer._call_has_training_arg = "training" in names
    layer._call_has_mask_arg = "mask" in names
    layer._call_has_context_arg = {name: name in names for name in layer._call_context_args}


def _wrapped_build(layer, build):
    def build_wrapper(*args, **kwargs):
        with layer._open_name_scope():
            build(*args, **kwargs)
        layer._build_shapes_dict = inspect.signature(build).bind(*args, **kwargs).arguments
        layer.built = True
        layer._post_build()
        layer._lock_state()

    return build_wrapper


def _wrapped_quantize(layer, quantize):
    from keras.src.quantizers.quantization_config import validate_and_resolve_config

    def quantize_wrapper(mode=None, config=None, **kwargs):
        config = validate_and_resolve_config(mode, config)
        layer._check_quantize_args(config.mode, layer.compute_dtype)
        with unlocked(layer):
            quantize(mode=config.mode, config=config, **kwargs)

    return quantize_wrapper


def run_in_inference_mode(layer):
    """Makes a frozen layer's calls ignore `training`, whatever its trainable flag becomes.

    `BatchNormalization.call` (3.15.1) asks for the flag, and `model.trainable = True` sets that of
    every layer. A bound method in the instance's dictionary is what `Layer.__call__` finds first,
    and `deepcopy` binds it to the copy.
    """
    layer.__dict__["call"] = types.MethodType(_call_in_inference_mode, layer)


def run_in_any_mode(layer):
    """Undoes `run_in_inference_mode`."""
    if getattr(layer.__dict__.get("call"), "__func__", None) is _call_in_inference_mode:
        del layer.__dict__["call"]


def _call_in_inference_mode(self, inputs, training=None, **kwargs):
    return type(self).call(self, inputs, training=False, **kwargs)


def refresh_torch_parameters(layers):
    """Makes torch's view of the layers (`parameters()`, `state_dict()`, `to()`) current.

    `TorchLayer._torch_params` (3.15.1) is filled when a layer is built and then follows what the
    layer itself gains or loses, not what layers below it do.
    """
    for layer in layers:
        if "_torch_params" in layer.__dict__.get("_modules", {}):
            layer._track_variables()


def training_in_call_context():
    """Returns the `training` value of the outermost running call, or None.

    A user's `call(self, x)` that delegates to `super().call(x)` passes no `training` on; Keras
    keeps the value in the call context (3.15.1, `Layer.__call__`), which has no public reader.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    return None if context is None else context.get_value("training")


def set_mask(tensor, mask):
    """Attaches a Keras mask to a tensor; the public API only reads masks (3.15.1)."""
    masking.set_keras_mask(tensor, mask)


def build_shapes(layer):
    """Returns the shapes that the layer was built with, by argument name, or None.

    `Layer._build_shapes_dict` (3.15.1); the public `get_build_config` loses the names.
    """
    return layer._build_shapes_dict


def is_functional(layer):
    """Whether the layer is a functional model, whose `layers` are in the graph's order.

    `keras.src.models.Functional` (3.15.1): Keras has no public name for the class.
    """
    from keras.src.models import Functional

    return isinstance(layer, Functional)


def attributes(layer):
    """Yields a layer's attributes by name, sorted, without those of Keras's own bookkeeping.

    torch's `Module` keeps submodules in a dictionary of its own, the other backends among the
    attributes, and TensorFlow adds dictionaries of what it tracks; a path made from these names has
    to be the same on all three (3.15.1).
    """
    values = {**vars(layer), **vars(layer).get("_modules", {})}
    for name in sorted(values):
        if name not in _BOOKKEEPING and not name.startswith(("__", "_self_unconditional_")):
            yield name, values[name]


@contextlib.contextmanager
def methods_replaced(replacements):
    """Replaces methods of single layers within the block.

    An entry in the instance's dictionary is what `self.method` finds first; it goes past
    `Layer.__setattr__` and the trackers of TensorFlow and torch (3.15.1), and leaves nothing
    behind.

    Args:
        replacements: Tuples (layer, name of the method, function that takes its place).
    """
    before = [(layer, name, layer.__dict__.get(name)) for layer, name, _ in replacements]
    try:
        for layer, name, function in replacements:
            layer.__dict__[name] = function
        yield
    finally:
        for layer, name, value in before:
            if value is None:
                layer.__dict__.pop(name, None)
            else:
                layer.__dict__[name] = value


def automatic_config(layer, layer_class):
    """Returns the arguments that Keras noted of a layer whose class has no `get_config`, or {}.

    `Operation._auto_config` (3.15.1) is read by `Operation.get_config` where that is the layer's
    own, which it no longer is once the layer's class is one that adds to the config.

    Raises:
        NotImplementedError: If Keras could not note them.
    """
    if not hasattr(layer_class.get_config, "_is_default"):
        return {}
    noted = layer._auto_config
    if noted is None:
        raise NotImplementedError(
            f"Layer '{layer.name}' cannot be saved: {layer_class.__name__} has no `get_config`, "
            "and its arguments are not plain values. Write one that returns its arguments."
        )
    return dict(noted.config)
