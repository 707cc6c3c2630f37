"""What every LoRA+ layer shares: settings, freezing, adopting, files and merging."""

import warnings
from typing import TYPE_CHECKING

import keras

from keras_loraplus import _compat
from keras_loraplus.layers import quantized
from keras_loraplus.layers.merging import is_surely_finite, merged_matrix
from keras_loraplus.layers.products import Products
from keras_loraplus.layers.spec import AdapterSpec
from keras_loraplus.layers.storage import StoredLayer

if TYPE_CHECKING:
    # The mixin stands in front of a Keras layer and uses its attributes.
    from keras.layers import Layer as _Mixed
else:
    _Mixed = object


class LowRankLayer(Products, StoredLayer, _Mixed):
    """Mixin in front of a Keras layer that freezes its kernel and adds `s (x A) B`.

    A subclass says how its factors are made in `_plan_factors`, adds them in `call`, and lists them
    in `_factors`. The scale s is a non-trainable float32 scalar, so that merging and disabling also
    hold in functions that were traced before.
    """

    # The Keras class that merging leaves behind.
    plain_class: type
    _is_adopted = False
    # Names of the layer's weights before it had an adapter, in the order weight files may use.
    _plain_names: tuple = ()

    def __init__(
        self,
        *args,
        rank=8,
        alpha=None,
        init="loraplus",
        scaling="standard",
        dropout=0.0,
        max_rank=None,
        **kwargs,
    ):
        """Checks the adapter's settings, then makes the Keras layer."""
        if kwargs.pop("lora_rank", None) is not None or kwargs.pop("lora_alpha", None) is not None:
            raise ValueError(
                f"{type(self).__name__} takes `rank` and `alpha`, not Keras's `lora_rank` and "
                "`lora_alpha`. Pass rank=... and alpha=... instead."
            )
        spec = AdapterSpec(rank, alpha, init, scaling, dropout, max_rank)
        # Before Keras's own __init__, because `Embedding(weights=...)` builds inside it; past
        # __setattr__, because that needs it. An adopting class has put its own settings already.
        self.__dict__.setdefault("_adapter", spec)
        super().__init__(*args, **kwargs)

    @property
    def adapter(self):
        """The adapter's settings, an `AdapterSpec`."""
        return self._adapter

    def build(self, input_shape=None):
        """Builds the Keras layer, then freezes its kernel and creates A, B and the scale."""
        # A named argument: Keras hands shapes to `build` by name, and saves them by it.
        super().build(input_shape)
        if not hasattr(self, "lora_scaling"):
            self._build_adapter()

    def _build_adapter(self):
        self._check_adaptable()
        self.__dict__["_plain_names"] = tuple(v.name for v in _compat.own_variables(self))
        _compat.freeze_variables(self, self._kernels())
        names = self.__dict__.get("_frozen_names", ())
        own = _compat.own_variables(self)
        # After the kernel, as in enabling: equal layers have equal orders of variables.
        _compat.freeze_variables(self, [variable for variable in own if variable.name in names])
        self._build_factors(self._adapter)
        with _compat.laid_out_as(self._kernels()[0], ()):
            self.lora_scaling = self.add_weight(
                name="lora_scaling",
                shape=(),
                initializer=keras.initializers.Constant(self._adapter.scale),
                dtype="float32",
                autocast=False,
                trainable=False,
            )
        if self._adapter.dropout:
            with _compat.laid_out_as(self._kernels()[0], (None,)):
                self.lora_seed_generator = keras.random.SeedGenerator()

    def _build_factors(self, spec):
        factors = self._plan_factors(spec)
        for a, b in zip(factors[::2], factors[1::2], strict=True):
            self._warn_of_rank(a.fan, b.fan)
        for factor in factors:
            # autocast=False: A and B are read in float32 under every policy and cast once, after
            # the scale has been applied.
            with _compat.laid_out_as(*self._layout_of(factor)):
                variable = self.add_weight(
                    name=factor.name,
                    shape=factor.shape_at(spec.width),
                    initializer=factor.initial(spec.width),
                    dtype="float32",
                    autocast=False,
                )
            setattr(self, factor.name, variable)

    def _layout_of(self, factor):
        kernel, axes = quantized.stored(self, factor.kernel), factor.kernel_axes
        if self.quantization_mode not in (None, "int8"):
            # What is packed has other axes than the matrix.
            axes = (None,) * len(axes)
        return kernel, axes

    def _kernels(self):
        return [self.frozen_matrix(pair.kernel) for pair in self._factors()]

    def _matrix_shape(self, name):
        return quantized.matrix_shape(self, name)

    def frozen_names(self):
        """Returns the names of what is frozen for good beside the kernel, for example the bias.

        The layer's config keeps them, so that a saved layer does not train more once it is loaded.
        """
        before = self.__dict__.get("_before_adoption")
        if before is None:
            return self.__dict__.get("_frozen_names", ())
        kernels = {id(variable) for variable in self._kernels()}
        frozen = {id(variable) for variable in self._non_trainable_variables} - kernels
        return tuple(variable.name for variable, _ in before.trainable if id(variable) in frozen)

    def _warn_of_rank(self, fan_in, fan_out):
        """Warns of a rank that makes A and B larger than any product of theirs needs."""
        rank = self._adapter.width
        if rank > max(fan_in, fan_out):
            warnings.warn(
                f"The rank {rank} of the adapter of layer '{self.path or self.name}' is larger "
                f"than both sides of its kernel, {fan_in} and {fan_out}: it trains more numbers "
                f"than the kernel has. A rank of at most {min(fan_in, fan_out)} can express the "
                "same.",
                stacklevel=2,
            )

    @classmethod
    def matrix_attributes(cls):
        """Returns the attributes through which a layer of `plain_class` gives its matrices."""
        return ("kernel",)

    @classmethod
    def why_incomplete(cls):
        """Returns what a subclass lacks that an adapter needs, or None."""
        own = {name for base in cls.__mro__ if base is not LowRankLayer for name in vars(base)}
        missing = sorted({"_plan_factors", "_factors", "call"} - own)
        return f"it has no {' and no '.join(map(repr, missing))}" if missing else None

    def _plan_factors(self, spec) -> list:
        raise NotImplementedError

    def factors(self, spec=None):
        """Returns the `Factor` of every variable of `adapter_variables`, by name.

        Args:
            spec: `AdapterSpec` whose rank the factors have; `None` for the active one's.
        """
        return {factor.name: factor for factor in self._plan_factors(spec or self._adapter)}

    def _factors(self):
        raise NotImplementedError

    def _check_adaptable(self):
        reason = self.why_not_adaptable(self)
        if reason:
            raise ValueError(f"Layer '{self.name}' cannot have an adapter: {reason}.")

    @classmethod
    def why_not_adaptable(cls, layer):
        """Returns why a built Keras layer cannot carry this adapter, or None.

        Args:
            layer: A built layer of the Keras class that this class extends.

        Returns:
            A short text, or None if the layer can be adapted.
        """
        if getattr(layer, "kernel_constraint", None) is not None:
            return "its kernel_constraint would hold for W alone, not for W + s A B"
        if getattr(layer, "lora_enabled", False):
            return "Keras's own LoRA is enabled on it"
        if layer.quantization_mode is not None:
            return quantized.why_not_adaptable(layer)
        return None

    @classmethod
    def from_layer(
        cls,
        layer,
        rank=8,
        alpha=None,
        init="loraplus",
        scaling="standard",
        dropout=0.0,
        max_rank=None,
    ):
        """Gives a built Keras layer an adapter in place.

        The layer stays the same object, in every model and graph that holds it; its kernel is
        frozen and A and B train beside it. Its outputs do not change, because A B is zero.

        Args:
            layer: A built layer of the Keras class that this class extends, or of a subclass of it
                whose `call` delegates to `super().call(...)`.
            rank: Positive integer r.
            alpha: Strength; `None` means `rank`.
            init: `"loraplus"`, `"lora"` or a pair of Keras initializers.
            scaling: `"standard"` or `"rslora"`.
            dropout: Rate at which the adapter's input is dropped while training.
            max_rank: Rank up to which A and B have room; `None` means `rank`.

        Returns:
            The same layer object, now an instance of this class.

        Raises:
            ValueError: If the layer or a setting does not fit; the layer is unchanged.

        Example:
            >>> dense = keras.layers.Dense(4)
            >>> dense.build((None, 3))
            >>> LoRAPlusDense.from_layer(dense, rank=2) is dense
            True
        """
        from keras_loraplus.layers.adapter_types import lora_class_for
        from keras_loraplus.layers.adopt import adopt

        spec = AdapterSpec(rank, alpha, init, scaling, dropout, max_rank)
        found = lora_class_for(type(layer))
        if found is None or not issubclass(found, cls):
            raise ValueError(
                f"{cls.__name__}.from_layer expects a built layer of the class that it is "
                f"registered for{_plain_name(cls)}. Received: {layer!r} of type "
                f"{type(layer).__name__}."
            )
        return adopt(layer, spec)

    def initial_factors(self, spec):
        """Returns new initial values of A and B for an adapter of other settings.

        Args:
            spec: An `AdapterSpec` of the same `max_rank`.

        Returns:
            Dict from the name of a variable to its value, zeros beyond the rank.
        """
        width = self._adapter.width
        return {
            factor.name: factor.initial(width)(factor.shape_at(width), dtype="float32")
            for factor in self._plan_factors(spec)
        }

    def take_spec(self, spec):
        """Takes the rank and scale of another adapter, whose A and B have been assigned."""
        self.__dict__["_adapter"] = spec
        self.lora_scaling.assign(spec.scale)

    def merged_values(self):
        """Returns `W + s A B` for every frozen matrix of the layer.

        The sum is formed in float32 and cast to the matrix's own dtype; that of a quantized matrix
        stays float32.

        Returns:
            Dict from the attribute name of the frozen variable to its merged value.
        """
        return {pair.kernel: merged_matrix(self, pair) for pair in self._factors()}

    def merges_finitely(self):
        """Returns whether bounds alone show that every merged value is finite."""
        return all(is_surely_finite(self, pair) for pair in self._factors())

    def merged_names(self):
        """Returns the attribute names of the frozen variables that adapters stand beside."""
        return [pair.kernel for pair in self._factors()]

    def frozen_matrix(self, name):
        """Returns the variable of one of `merged_names`, packed if it is quantized."""
        return quantized.stored(self, name)

    def adapter_variables(self):
        """Returns the names and variables of A and B, in the order A, B."""
        return {name: getattr(self, name) for pair in self._factors() for name in (pair.a, pair.b)}

    def enable_lora(self, *args, **kwargs):
        """Refuses Keras's own LoRA on a layer that has this one.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"Layer '{self.name}' already has a LoRA+ adapter of rank {self.adapter.rank}; Keras's "
            "`enable_lora` cannot be added to it. Merge it first: "
            "`keras_loraplus.merge_lora_plus(model)`."
        )

    def quantized_call(self, *args, **kwargs):
        """Computes what `call` does: Keras comes in here where the kernel is quantized."""
        return self.call(*args, **kwargs)

    def quantize(self, mode=None, type_check=True, config=None):
        """Quantizes the frozen side; A and B stay float32 and are trained on.

        Args:
            mode: `"int8"` or `"int4"`.
            type_check: Keras's own argument; a layer that has an adapter is quantized either way.
            config: A `keras.quantizers.QuantizationConfig`, or None.

        Raises:
            NotImplementedError: If the mode or the layer's class does not allow it; the layer is
                unchanged. `Model.quantize` reports it as a warning and goes on.
            ValueError: For GPTQ and AWQ, which stops `Model.quantize`.
        """
        del type_check
        if mode is None and config is not None:
            mode = config.mode
        reason = quantized.why_not_quantizable(self, mode)
        if reason:
            # `Model.quantize` turns the first into a warning. After that it would calibrate, and
            # drop the kernel of, a layer that is not prepared for it.
            error = ValueError if mode in quantized.CALIBRATED else NotImplementedError
            raise error(
                f"Layer '{self.path or self.name}' has a LoRA+ adapter and is not quantized to "
                f"{mode}: {reason}."
            )
        super().quantize(mode, type_check=False, config=config)

    def get_config(self):
        """Returns the Keras layer's config and the adapter's settings."""
        config = super().get_config()
        config.pop("lora_rank", None)
        config.pop("lora_alpha", None)
        if self._is_adopted:
            # The adapter's settings have a place of their own there: the user's class may have
            # arguments of the same names.
            return config
        return {**config, **self._adapter.get_config()}


def _plain_name(lora_class):
    plain = getattr(lora_class, "plain_class", None)
    return "" if plain is None else f", `{plain.__name__}`"


def is_adapted(layer):
    """Whether the layer carries a LoRA+ adapter."""
    return isinstance(layer, LowRankLayer)
