"""Attention's projections as EinsumDense: with heads beside their width, and moved to the front."""

import functools

import keras
import numpy as np

from benchmarks.arms import RANK, SEED, Training
from benchmarks.dense_cases import limit, native, ours

SIZES = {"width": 1024, "heads": 16, "batch": 8, "tokens": 32, "pairs": 3}
# Equations to the heads and back. In the second pair an adapter's products are not those of
# matrices: the heads stand before the tokens.
EQUATIONS = {
    "flat": ("abc,cde->abde", "abcd,cde->abe"),
    "moved": ("abc,cde->adbe", "adbe,dec->abc"),
}


def einsum(kind, sizes=None):
    """A training step on pairs of projections to the heads and back, rank 8."""
    return {
        arm: functools.partial(einsum_training, kind, prepare, sizes or SIZES)
        for arm, prepare in (("ours", ours), ("native", native), ("limit", limit))
    }


def einsum_training(kind, prepare, sizes):
    keras.utils.set_random_seed(SEED)
    width, heads, tokens = sizes["width"], sizes["heads"], sizes["tokens"]
    to_heads, back = EQUATIONS[kind]
    size = {"b": tokens, "d": heads, "e": width // heads}
    split = [size[axis] for axis in to_heads.split("->")[1][1:]]
    layers = []
    for number in range(sizes["pairs"]):
        layers += [
            keras.layers.EinsumDense(to_heads, split, bias_axes="de", name=f"dense_in_{number}"),
            keras.layers.EinsumDense(
                back, (tokens, width), bias_axes=back[-1], name=f"dense_out_{number}"
            ),
        ]
    model = keras.Sequential([keras.Input((tokens, width)), *layers])
    rng = np.random.default_rng(SEED)
    x, y = (rng.normal(size=(sizes["batch"], tokens, width)).astype("float32") for _ in range(2))
    model.compile(prepare(model, RANK), "mse")
    return Training(model, x, y)
