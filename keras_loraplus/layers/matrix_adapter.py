"""The base of adapters for layers that hold their matrices as variables of their own."""

import keras
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.layers.base import LowRankLayer
from keras_loraplus.layers.einsum_split import kernel_axes, split_einsum
from keras_loraplus.layers.factors import Factor, Factors
from keras_loraplus.layers.initial import factor_initializers


class MatrixAdapter(LowRankLayer):
    """Adapter of a layer that multiplies its inputs by variables of its own.

        product = einsum(x, W) + s einsum(einsum(x, A), B),    s = alpha / rank

    for each matrix that `equations` names. The equation splits it as `LoRAPlusEinsumDense` does:
    the axes that the input contracts go to A, those of the output to B, and those of `groups` to
    both. A subclass is registered with `keras_loraplus.register_adapter`, which says what it needs
    and has an example.

    The product with W is `keras.ops.einsum`'s. A layer that multiplies by other means, such as
    `keras.ops.matmul`, may differ from it in the last bit once it is adapted.

    Attributes:
        equations: Dict from the attribute that holds a matrix to its equation
            `input,matrix->output`.
        groups: Letters of axes along which every matrix has factors of its own, experts say.

    Variables:
        `lora_kernel_<attribute>_a` and `lora_kernel_<attribute>_b` float32, for each matrix;
        `lora_scaling` () frozen. Weights of the layer keep their names and are frozen.

    Example:
        >>> class Bank(klp.layers.MatrixAdapter):
        ...     equations = {"up": "th,ehm->etm", "down": "etm,emh->eth"}
        ...     groups = "e"
        ...     def call(self, inputs, training=None):
        ...         hidden = keras.ops.relu(self.product("up", inputs, training))
        ...         return self.product("down", hidden, training)

    Source: Hu et al., arXiv 2106.09685, written for einsum kernels; arXiv 2402.12354.
    """

    equations: dict = {}
    groups = ""
    # The adapter and the class that it was registered for, set where both are put together.
    registered_as: tuple

    def __init__(self, *args, **kwargs):
        """Takes the layer's arguments; an adopted layer's may be called like an adapter's."""
        if self._is_adopted:
            super(LowRankLayer, self).__init__(*args, **kwargs)
        else:
            super().__init__(*args, **kwargs)

    def product(self, name, inputs, training=None):
        """Returns the product of the inputs and one matrix, its adapter included.

        Neither `W + s A B` nor a gradient of the matrix's size is formed.

        Args:
            name: A key of `equations`.
            inputs: Tensor of the axes that the equation says.
            training: What `call` was given; the adapter's dropout acts where it is true.

        Returns:
            Tensor of the axes that the equation says, in the compute dtype.
        """
        split = split_einsum(self.equations[name], self.groups)
        a, b = self._scaled(*(getattr(self, factor) for factor in _names(name)))
        kernel = self._frozen(getattr(self, name))
        outputs = _compat.einsum_of_frozen(self.equations[name], inputs, kernel)
        inner = ops.einsum(split.down, self._dropped(inputs, training), a)
        return ops.add(outputs, ops.einsum(split.up, inner, b))

    def _plan_factors(self, spec):
        factors = []
        for name, equation in self.equations.items():
            split, axes = split_einsum(equation, self.groups), kernel_axes(equation)
            shape = self._matrix_shape(name)
            a_shape, b_shape = split.shapes(axes, shape, spec.rank)
            fans = split.fan_in(axes, shape), split.fan_out(axes, shape)
            initializers = factor_initializers(spec.init, fans[0], spec.rank)
            where = {axis: position for position, axis in enumerate(axes)}
            a_axes = (*(where[axis] for axis in split.a_axes), None)
            b_axes = tuple(where.get(axis) for axis in split.b_axes)
            a, b = _names(name)
            factors += [
                Factor(a, a_shape, initializers[0], fans[0], a_axes, name),
                Factor(b, b_shape, initializers[1], fans[1], b_axes, name),
            ]
        return factors

    def _factors(self):
        return tuple(_pair(name, eq, self.groups) for name, eq in self.equations.items())

    @classmethod
    def matrix_attributes(cls):
        """Returns the attributes that hold the frozen matrices."""
        return tuple(cls.equations)

    @classmethod
    def why_incomplete(cls):
        """Returns what a subclass lacks that an adapter needs, or None."""
        if not isinstance(cls.equations, dict) or not cls.equations:
            return (
                "`equations` must name the matrices, as in {'kernel': 'bi,ij->bj'}. Received: "
                f"equations={cls.equations!r}"
            )
        for name, equation in cls.equations.items():
            try:
                split_einsum(equation, cls.groups)
            except ValueError as error:
                return f"the equation of '{name}': {error}".rstrip(".")
        if "call" not in {method for base in cls.__mro__ for method in _own_methods(base)}:
            return "it needs a `call` that computes with `self.product(...)`"
        return None

    @classmethod
    def why_not_adaptable(cls, layer):
        """Returns why a built layer cannot carry the adapter, or None."""
        for name, equation in cls.equations.items():
            variable, axes = getattr(layer, name, None), kernel_axes(equation)
            if not isinstance(variable, keras.Variable):
                return f"it has no weight in `{name}`, where {cls.__name__} expects one"
            if len(variable.shape) != len(axes):
                return (
                    f"`{name}` has shape {tuple(variable.shape)}, where {cls.__name__} expects one "
                    f"of the axes '{axes}'"
                )
            if variable.constraint is not None:
                return f"the constraint of `{name}` would hold for W alone, not for W + s A B"
        names = [variable.name for variable in _compat.own_variables(layer)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            # A file could not tell them apart, nor could the order of its weights be kept.
            return f"it has several weights of one name: {twice}"
        return super().why_not_adaptable(layer)


def _own_methods(base):
    # `Layer` has a `call` that only raises; the adapted class's own would go past the adapter.
    return vars(base) if issubclass(base, LowRankLayer) else ()


def _names(attribute):
    name = f"lora_kernel_{attribute.strip('_')}"
    return f"{name}_a", f"{name}_b"


def _pair(attribute, equation, groups):
    split = split_einsum(equation, groups)
    product = lambda a, b: ops.einsum(split.delta, a, b)  # noqa: E731
    a, b = _names(attribute)
    return Factors(attribute, a, b, product, split)
