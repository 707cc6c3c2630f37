"""What a case is, and the inputs that several share."""

import dataclasses
from typing import Any

import keras_hub
import numpy as np

BATCH, LENGTH, VOCABULARY = 2, 6, 13


@dataclasses.dataclass(frozen=True)
class Case:
    """One backbone class in the smallest configuration that uses all of it.

    Attributes:
        name: Name of the class in `keras_hub.models`.
        make: Function that returns a new backbone; equal calls make equal backbones.
        inputs: Function that returns a batch of inputs for it.
    """

    name: str
    make: Any
    inputs: Any


def case(name, arguments, inputs):
    """A case whose arguments are a dict, or a function that makes one with new encoders in it."""

    def make():
        made = arguments() if callable(arguments) else dict(arguments)
        return getattr(keras_hub.models, name)(**made)

    return Case(name, make, inputs)


def random(seed=0):
    return np.random.default_rng(seed)


def ids(length=LENGTH, vocabulary=VOCABULARY, seed=0):
    return random(seed).integers(1, vocabulary, size=(BATCH, length)).astype("int32")


def ones(length=LENGTH, dtype="int32"):
    return np.ones((BATCH, length), dtype)


def reals(*shape, seed=0):
    return random(seed).normal(size=(BATCH, *shape)).astype("float32")


def images(size, width=None):
    return reals(size, width or size, 3)


def image(size, width=None):
    """Inputs of a backbone that takes an image alone, not by name."""
    return lambda: images(size, width)


def text():
    return {"token_ids": ids(), "padding_mask": ones()}


def text_with_segments():
    return {**text(), "segment_ids": ids(vocabulary=3) - 1}


def encoder_decoder():
    return {
        "encoder_token_ids": ids(5),
        "encoder_padding_mask": ones(5),
        "decoder_token_ids": ids(seed=1),
        "decoder_padding_mask": ones(),
    }
