"""One small case for every LoRA+ layer, with its formula in numpy float64."""

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_loraplus import layers as kl

RANK, ALPHA = 3, 5.0
SCALES = {"standard": ALPHA / RANK, "rslora": ALPHA / np.sqrt(RANK)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer type in one configuration.

    `formula(x, variables, scale)` is the layer without dropout, where `variables` holds float64
    arrays by name: the plain layer with the kernel W + s A B.
    """

    name: str
    plain: Any
    lora: Any
    arguments: dict
    shape: tuple
    formula: Any
    positional: tuple = ()
    reverse: bool = False

    def make(self, **kwargs):
        """Returns the LoRA+ layer, unbuilt."""
        settings = {"rank": RANK, "alpha": ALPHA, **self.arguments, **kwargs}
        return self.lora(*self.positional, **settings)

    def make_plain(self, **kwargs):
        """Returns the Keras layer, built, with non-zero weights."""
        layer = self.plain(*self.positional, **{**self.arguments, **kwargs})
        self.call(layer)
        randomize(layer.weights, 3)
        return layer

    def inputs(self, seed=0):
        rng = np.random.default_rng(seed)
        if self.takes_tokens:
            return rng.integers(0, self.positional[0], size=self.shape).astype("int32")
        return rng.normal(size=self.shape).astype("float32")

    @property
    def takes_tokens(self):
        return issubclass(self.plain, keras.layers.Embedding) and not self.reverse

    def call(self, layer, inputs=None, **kwargs):
        inputs = self.inputs() if inputs is None else inputs
        if self.reverse:
            kwargs["reverse"] = True
        return layer(inputs, **kwargs)

    def expected(self, layer, inputs=None, overrides=None):
        """Returns the output by the formula, in float64."""
        values = {v.name: as_float64(v) for v in layer.weights if "seed" not in v.name}
        values.update(overrides or {})
        inputs = self.inputs() if inputs is None else inputs
        inputs = inputs if self.takes_tokens else inputs.astype("float64")
        return self.formula(inputs, values, layer.adapter.scale)


def as_float64(variable):
    return np.asarray(keras.ops.convert_to_numpy(variable)).astype("float64")


def snapshot(variables):
    """Returns copies of the values, exact for every dtype."""
    return [np.array(keras.ops.convert_to_numpy(v), copy=True) for v in variables]


def randomize(variables, seed=7, scale=0.5):
    """Writes random non-zero values into weights of floating dtype."""
    rng = np.random.default_rng(seed)
    for variable in variables:
        if variable.name == "lora_scaling":
            continue
        if "float" in keras.backend.standardize_dtype(variable.dtype):
            variable.assign(rng.normal(scale=scale, size=variable.shape).astype("float32"))


def factors(layer):
    """Returns the adapter variables A, B (and C, D) of a layer."""
    return list(layer.adapter_variables().values())


def all_factors(model):
    """Returns every adapter variable of a model, each once."""
    found = [layer for layer in model._flatten_layers() if kl.is_adapted(layer)]
    return [variable for layer in found for variable in factors(layer)]


def randomize_factors(model_or_layer, seed=11):
    randomize(all_factors(model_or_layer), seed)


def _dense(x, v, s):
    return np.tanh(x @ (v["kernel"] + s * v["lora_kernel_a"] @ v["lora_kernel_b"]) + v["bias"])


def _einsum(equation, delta):
    def formula(x, v, s):
        kernel = v["kernel"] + s * np.einsum(delta, v["lora_kernel_a"], v["lora_kernel_b"])
        return np.tanh(np.einsum(equation, x, kernel) + v.get("bias", 0.0))

    return formula


def _table(v, s):
    return v["embeddings"] + s * v["lora_embeddings_a"] @ v["lora_embeddings_b"]


def _embedding(x, v, s):
    return _table(v, s)[x]


def _reverse_tied(cap):
    def formula(x, v, s):
        logits = x @ _table(v, s).T
        return np.tanh(logits / cap) * cap if cap else logits

    return formula


def _reverse_untied(cap):
    def formula(x, v, s):
        kernel = v["reverse_embeddings"] + s * v["lora_kernel_a"] @ v["lora_kernel_b"]
        logits = x @ kernel
        return np.tanh(logits / cap) * cap if cap else logits

    return formula


def numpy_conv(x, kernel, strides, padding, dilation, groups=1):
    """A convolution of channels-last input, by the definition."""
    window = kernel.shape[:-2]
    pads = [(0, 0)]
    for size, length, stride, step in zip(window, x.shape[1:-1], strides, dilation, strict=True):
        reach = (size - 1) * step + 1
        if padding == "same":
            total = max((-(-length // stride) - 1) * stride + reach - length, 0)
            pads.append((total // 2, total - total // 2))
        elif padding == "causal":
            pads.append((reach - 1, 0))
        else:
            pads.append((0, 0))
    x = np.pad(x, [*pads, (0, 0)])
    sizes = [
        (length - (size - 1) * step - 1) // stride + 1
        for size, length, stride, step in zip(window, x.shape[1:-1], strides, dilation, strict=True)
    ]
    filters, channels = kernel.shape[-1], kernel.shape[-2]
    outputs = np.zeros((x.shape[0], *sizes, filters))
    for offset in np.ndindex(*window):
        cut = tuple(
            slice(at * step, at * step + (size - 1) * stride + 1, stride)
            for at, step, size, stride in zip(offset, dilation, sizes, strides, strict=True)
        )
        seen = x[(slice(None), *cut)]
        for group in range(groups):
            own = slice(group * filters // groups, (group + 1) * filters // groups)
            part = seen[..., group * channels : (group + 1) * channels]
            outputs[..., own] += part @ kernel[offset][:, own]
    return outputs


def _conv(n, strides=1, padding="valid", dilation=1, groups=1, channels_first=False):
    def formula(x, v, s):
        kernel = v["kernel"] + s * v["lora_kernel_a"] @ v["lora_kernel_b"]
        x = np.moveaxis(x, 1, -1) if channels_first else x
        out = numpy_conv(x, kernel, (strides,) * n, padding, (dilation,) * n, groups)
        out = np.tanh(out + v["bias"])
        return np.moveaxis(out, -1, 1) if channels_first else out

    return formula


def _conv_case(n, name, shape, filters=6, **options):
    formula_options = {
        "strides": options.get("strides", 1),
        "padding": options.get("padding", "valid"),
        "dilation": options.get("dilation_rate", 1),
        "groups": options.get("groups", 1),
        "channels_first": options.get("data_format") == "channels_first",
    }
    plain = getattr(keras.layers, f"Conv{n}D")
    lora = getattr(kl, f"LoRAPlusConv{n}D")
    arguments = {"activation": "tanh", "bias_initializer": "glorot_uniform", **options}
    arguments["bias_initializer"] = keras.initializers.RandomNormal(stddev=0.3, seed=5)
    return Case(
        f"conv{n}d-{name}", plain, lora, arguments, shape, _conv(n, **formula_options), (filters, 3)
    )


def _einsum_case(name, equation, output_shape, shape, delta, bias_axes):
    return Case(
        f"einsum-{name}",
        keras.layers.EinsumDense,
        kl.LoRAPlusEinsumDense,
        {
            "output_shape": output_shape,
            "bias_axes": bias_axes,
            "activation": "tanh",
            "bias_initializer": keras.initializers.RandomNormal(stddev=0.3, seed=5),
        },
        shape,
        _einsum(equation, delta),
        (equation,),
    )


def _reversible(name, formula, shape, reverse, **options):
    plain, lora = keras.layers.ReversibleEmbedding, kl.LoRAPlusReversibleEmbedding
    name = f"reversible-{name}"
    return Case(name, plain, lora, options, shape, formula, (11, 6), reverse)


_BIAS = keras.initializers.RandomNormal(stddev=0.3, seed=5)

CASES = [
    Case(
        "dense",
        keras.layers.Dense,
        kl.LoRAPlusDense,
        {"activation": "tanh", "bias_initializer": _BIAS},
        (2, 3, 5),
        _dense,
        (7,),
    ),
    _einsum_case("query", "bqm,muh->bquh", (None, 2, 4), (2, 3, 5), "mr,ruh->muh", "uh"),
    _einsum_case("output", "bquh,uhm->bqm", (None, 5), (2, 3, 2, 4), "uhr,rm->uhm", "m"),
    _einsum_case("heads-first", "bsd,kdh->bskh", (None, 2, 4), (2, 3, 5), "dr,rkh->kdh", "kh"),
    _einsum_case("left", "...x,xy->...y", (4,), (2, 3, 5), "xr,ry->xy", "y"),
    _einsum_case("right", "xa...,ab->xb...", (4, None), (2, 5, 3), "ar,rb->ab", None),
    _einsum_case("experts", "eti,eih->eth", (3, 4), (2, 3, 5), "eir,erh->eih", "h"),
    Case("embedding", keras.layers.Embedding, kl.LoRAPlusEmbedding, {}, (2, 5), _embedding, (9, 4)),
    _reversible("tied", _embedding, (2, 5), False),
    _reversible("tied-reverse", _reverse_tied(None), (2, 5, 6), True),
    _reversible("tied-reverse-cap", _reverse_tied(1.5), (2, 5, 6), True, logit_soft_cap=1.5),
    _reversible("untied", _embedding, (2, 5), False, tie_weights=False),
    _reversible(
        "untied-reverse",
        _reverse_untied(1.5),
        (2, 5, 6),
        True,
        tie_weights=False,
        logit_soft_cap=1.5,
        reverse_dtype="float32",
    ),
    _conv_case(1, "valid", (2, 8, 3)),
    _conv_case(1, "causal", (2, 8, 3), padding="causal", dilation_rate=2),
    _conv_case(1, "same-strided", (2, 8, 3), padding="same", strides=2),
    _conv_case(1, "dilated", (2, 8, 3), dilation_rate=2),
    _conv_case(1, "groups", (2, 8, 4), groups=2, padding="same"),
    _conv_case(2, "same", (2, 5, 6, 3), padding="same"),
    _conv_case(2, "strided", (2, 5, 6, 3), strides=2, padding="same"),
    _conv_case(2, "groups", (2, 5, 6, 4), groups=2),
    # Enough channels for A's convolution to be a product of matrices (JAX).
    _conv_case(1, "wide-causal", (2, 8, 11), padding="causal", dilation_rate=2),
    _conv_case(1, "wide-groups", (2, 8, 20), groups=2, padding="same"),
    _conv_case(3, "valid", (1, 4, 4, 4, 2)),
    _conv_case(3, "groups-same", (1, 4, 4, 3, 4), groups=2, padding="same"),
]

# Keras cannot run these on every backend (TensorFlow's CPU kernels are channels-last only).
CHANNELS_FIRST_CASES = [
    _conv_case(1, "channels-first", (2, 3, 8), data_format="channels_first", padding="same"),
    _conv_case(1, "causal-first", (2, 3, 8), data_format="channels_first", padding="causal"),
    _conv_case(2, "channels-first", (2, 3, 5, 6), data_format="channels_first"),
    _conv_case(2, "groups-first", (2, 4, 5, 6), data_format="channels_first", groups=2),
]

# One configuration of every layer type, for tests whose subject is the type.
ONE_OF_EACH = [
    case
    for case in CASES
    if case.name
    in {
        "dense",
        "einsum-query",
        "embedding",
        "reversible-tied",
        "reversible-untied-reverse",
        "conv1d-causal",
        "conv2d-groups",
        "conv3d-valid",
    }
]


def ids(cases):
    return [case.name for case in cases]
