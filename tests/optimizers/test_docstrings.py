"""The examples in the docstrings run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["adamw", "assignments", "factory", "multipliers"])
def test_examples(name):
    module = importlib.import_module(f"keras_loraplus.optimizers.{name}")
    failed, tried = doctest.testmod(module)
    assert tried > 0 and failed == 0
