"""Every example in a docstring of the package runs and prints what it says."""

import doctest
import importlib
import os
import pkgutil
import tempfile

import keras
import numpy as np
import pytest

import keras_loraplus

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(keras_loraplus.__path__, "keras_loraplus.")
)
# What a reader of an example is expected to have imported.
IMPORTED = {"keras": keras, "klp": keras_loraplus, "np": np, "os": os, "tempfile": tempfile}

PUBLIC = {name: getattr(keras_loraplus, name) for name in keras_loraplus.__all__}
PUBLIC |= {
    f"layers.{name}": getattr(keras_loraplus.layers, name) for name in keras_loraplus.layers.__all__
}


def examples(module):
    """Returns the doctests of a module's own objects."""
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.mark.parametrize("name", ["keras_loraplus", *MODULES])
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    for test in examples(module):
        # Public names a reader would import; those of the module itself come first.
        names = {**vars(keras_loraplus), **vars(keras_loraplus.layers), **vars(module)}
        test.globs = {**names, **IMPORTED}
        report: list = []
        failed, _ = runner.run(test, out=report.append)
        assert not failed, "".join(report)


def test_some_examples_were_found():
    found = [test.name for name in MODULES for test in examples(importlib.import_module(name))]
    assert "keras_loraplus.enable.enable_lora_plus" in found
    assert len(found) > 10


@pytest.mark.parametrize("name", [n for n, value in PUBLIC.items() if callable(value)])
def test_public_things_are_documented(name):
    assert (PUBLIC[name].__doc__ or "").strip(), f"{name} has no docstring"
