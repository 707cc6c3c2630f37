"""Which adapter a layer class has: one table, in which the library's own are entered too."""

import dataclasses
import functools
from typing import Any

import keras

from keras_loraplus.layers.base import LowRankLayer

LINEAR, CONVOLUTION, OTHER, NAMED = KINDS = ("linear", "convolution", "other", "named")


@dataclasses.dataclass(frozen=True)
class AdapterType:
    """One row of the table.

    Attributes:
        layer_class: A layer class, or its full name.
        adapter: Class of the adapter, or None where there is none.
        reason: Why there is none, or None.
        kind: Which targets mean the class, one of `KINDS`.
    """

    layer_class: Any
    adapter: Any
    reason: str | None
    kind: str


# By class, and by full name what is registered without being imported.
_TABLE: dict = {}


def register_adapter(layer_class, adapter=None, *, reason=None, kind=OTHER, overwrite=False):
    """Registers the adapter of a layer class, or why there is none.

    From then on `enable_lora_plus`, files, merging and the report know layers of that class. What
    is registered for a class holds for its subclasses, unless something nearer to them is: of all
    classes in `type(layer).__mro__` the first counts.

    An adapter is a subclass of `keras_loraplus.layers.MatrixAdapter`, for a layer that holds its
    matrices as variables of its own:

        equations      class attribute: {attribute of the layer: einsum equation of its product}
        groups         class attribute: letters of axes that have factors each (experts); default ""
        call           the layer's `call` once more, with `self.product(attribute, inputs,
                       training)` in place of each product, and an argument `training=None`

    For every matrix W of shape (n, m), or (e, n, m) with `groups="e"`, the adapter then holds
    `lora_kernel_<attribute>_a` (n, r) and `lora_kernel_<attribute>_b` (r, m), or (e, n, r) and
    (e, r, m), in float32, which optimizers know by these names, and

        product = x W + s (x A) B,    s = alpha / rank

    W is frozen. Scale, dropout, initial values, files, named adapters and merging are inherited:
    the layer needs no method for them. It does need what Keras asks of every layer that is saved:
    a `get_config` of its own arguments, and different names for its weights. (`LowRankLayer` below
    it is what the adapters of Keras's own layers extend.) A mixin as it is, an adapter may be
    registered for several classes.

    Args:
        layer_class: A subclass of `keras.layers.Layer`, or its full name (`"package.module.Class"`)
            for one that need not be imported.
        adapter: A `MatrixAdapter` subclass; `None` to say, by `reason`, that there is none.
        reason: Text that the report gives for layers of this class: "not adaptable, and why".
        kind: Which targets mean the class. `"other"`: the default targets of a plain Keras model.
            `"linear"`: these and `"all-linear"`. `"convolution"`: these, and `"all-linear"` where
            a model has nothing linear. `"named"`: only targets that name the layer; where nobody
            does, the report says so.
        overwrite: Whether to replace what is registered for the same class.

    Returns:
        The adapter, so that `register_adapter(layer_class)` can decorate its class; without one,
        None.

    Raises:
        ValueError: If an argument does not fit, or the class is registered; nothing is changed.

    Example:
        >>> class Bilinear(keras.layers.Layer):
        ...     def build(self, shape):
        ...         self.w = self.add_weight(name="w", shape=(shape[-1], 3))
        ...     def call(self, inputs):
        ...         return keras.ops.square(keras.ops.einsum("bi,ij->bj", inputs, self.w))
        >>> @klp.register_adapter(Bilinear)
        ... class BilinearAdapter(klp.layers.MatrixAdapter):
        ...     equations = {"w": "bi,ij->bj"}
        ...     def call(self, inputs, training=None):
        ...         return keras.ops.square(self.product("w", inputs, training))
        >>> model = keras.Sequential([keras.Input((4,)), Bilinear(), keras.layers.Dense(2)])
        >>> report = klp.enable_lora_plus(model, rank=2)
        >>> report.adapted[0].shapes
        {'lora_kernel_w_a': (4, 2), 'lora_kernel_w_b': (2, 3)}
        >>> klp.unregister_adapter(Bilinear)

    Source: Hu et al., arXiv 2106.09685; PEFT registers custom modules for the same purpose.
    """
    if adapter is None and reason is None:
        return functools.partial(
            _register_class, layer_class=layer_class, kind=kind, overwrite=overwrite
        )
    _check_layer_class(layer_class)
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {list(KINDS)}. Received: kind={kind!r}.")
    if adapter is not None:
        _check_adapter(layer_class, adapter, reason)
    elif not isinstance(reason, str) or not reason.strip():
        raise ValueError(
            "`reason` must be a text that says why layers of the class have no adapter. Received: "
            f"reason={reason!r}."
        )
    found = _registered(layer_class)
    if found is not None and not overwrite:
        what = "no adapter" if found.adapter is None else found.adapter.__name__
        raise ValueError(
            f"'{_full_name(layer_class)}' is registered already, with {what}. To replace that, "
            "pass overwrite=True. Layers that have their adapters keep them."
        )
    if found is not None:
        del _TABLE[found.layer_class]
    _TABLE[layer_class] = AdapterType(layer_class, adapter, reason, kind)
    return adapter


def _register_class(adapter, layer_class, kind, overwrite):
    if adapter is None:
        raise ValueError(
            "`register_adapter` takes an adapter, or a reason why there is none. Received neither "
            f"for '{_full_name(layer_class)}'."
        )
    return register_adapter(layer_class, adapter, kind=kind, overwrite=overwrite)


def unregister_adapter(layer_class):
    """Forgets what is registered for a layer class.

    Layers that have an adapter keep it; a file of theirs loads once the class is registered again.

    Args:
        layer_class: The class, or its full name.

    Raises:
        ValueError: If nothing is registered for the class itself.

    Example:
        See `register_adapter`.
    """
    found = _registered(layer_class)
    if found is None:
        raise ValueError(
            f"Nothing is registered for '{_full_name(layer_class)}'. Registered: "
            f"{registered_names()}."
        )
    del _TABLE[found.layer_class]


def registered_names():
    """Returns the names of the classes that have adapters, sorted."""
    rows = _TABLE.values()
    return sorted(_full_name(r.layer_class).rpartition(".")[2] for r in rows if r.adapter)


def type_of(layer_class):
    """Returns the `AdapterType` of a layer class or of the nearest base that has one, or None."""
    return _found(layer_class)[1]


def kind_of(layer_class):
    """Returns which targets mean a layer class, one of `KINDS`; None for one without adapter."""
    found = type_of(layer_class)
    return None if found is None or found.adapter is None else found.kind


def lora_class_for(layer_class):
    """Returns the LoRA+ class that extends a Keras layer class, or None."""
    base, found = _found(layer_class)
    if found is None or found.adapter is None:
        return None
    return found.adapter if issubclass(found.adapter, base) else _in_front(found.adapter, base)


def _found(layer_class):
    for base in layer_class.__mro__:
        found = _TABLE.get(base) or _TABLE.get(_full_name(base))
        if found is not None:
            return base, found
    return None, None


@functools.cache
def _in_front(adapter, base):
    """Returns the class that a mixin makes with a layer class that it was registered for."""
    body = {
        "__module__": adapter.__module__,
        "__doc__": f"{base.__name__} with a low-rank adapter.",
        "plain_class": base,
        "registered_as": (adapter, base),
    }
    return type(adapter.__name__, (adapter, base), body)


def _registered(layer_class):
    """Returns the row of the class itself, whether by name or not."""
    if isinstance(layer_class, type):
        return _TABLE.get(layer_class) or _TABLE.get(_full_name(layer_class))
    rows = _TABLE.values()
    return next((row for row in rows if _full_name(row.layer_class) == layer_class), None)


def _full_name(layer_class):
    if isinstance(layer_class, type):
        return f"{layer_class.__module__}.{layer_class.__qualname__}"
    return str(layer_class)


def _check_layer_class(layer_class):
    if isinstance(layer_class, str):
        parts = layer_class.split(".")
        if len(parts) > 1 and all(part.isidentifier() for part in parts):
            return
    elif isinstance(layer_class, type) and issubclass(layer_class, keras.layers.Layer):
        if issubclass(layer_class, LowRankLayer):
            raise ValueError(
                f"{layer_class.__name__} has an adapter already. Register one for the plain layer "
                "class that it extends."
            )
        return
    raise ValueError(
        "`layer_class` must be a subclass of `keras.layers.Layer`, or the full name of one "
        f"('package.module.Class'). Received: {layer_class!r}."
    )


def _check_adapter(layer_class, adapter, reason):
    if reason is not None:
        raise ValueError(
            "`reason` says why there is no adapter; pass an adapter or a reason, not both. "
            f"Received: adapter={adapter!r}, reason={reason!r}."
        )
    if not isinstance(adapter, type) or not issubclass(adapter, LowRankLayer):
        raise ValueError(
            "`adapter` must be a subclass of `keras_loraplus.layers.MatrixAdapter` (or of "
            f"`LowRankLayer`). Received: {adapter!r}."
        )
    if issubclass(adapter, keras.layers.Layer) and adapter.plain_class is not layer_class:
        raise ValueError(
            f"{adapter.__name__} is the adapter of {adapter.plain_class.__name__} (its "
            f"`plain_class`), not of '{_full_name(layer_class)}'. Derive it from `MatrixAdapter` "
            "alone to register it for several classes."
        )
    reason = adapter.why_incomplete()
    if reason:
        raise ValueError(f"{adapter.__name__} is not a whole adapter: {reason}.")
