"""What import rules by package cannot see: `keras.src`, and imports inside functions."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "keras_loraplus"
BACKEND_PACKAGES = {"jax", "jaxlib", "keras_hub", "keras_nlp", "tensorflow", "torch"}


def imported_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and node.attr == "src":
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def is_internal(name):
    return name.split(".")[0] in BACKEND_PACKAGES or (name + ".").startswith("keras.src.")


@pytest.mark.parametrize(
    "source, found",
    [
        ("import keras.src.ops", True),
        ("from keras import src", True),
        ("def f():\n    import torch.nn", True),
        ("import keras\nkeras.src.backend", True),
        ("import importlib\nimportlib.import_module('jax.lax')", True),
        ("import keras\nfrom keras import ops", False),
        ("from .torch import x", False),
    ],
)
def test_the_check_can_fail(source, found):
    assert any(map(is_internal, imported_names(ast.parse(source)))) is found


def test_only_compat_touches_keras_src_and_backends():
    files = [f for f in sorted(PACKAGE.rglob("*.py")) if PACKAGE / "_compat" not in f.parents]
    assert files
    offences = [
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in files
        for name in imported_names(ast.parse(file.read_text(encoding="utf-8")))
        if is_internal(name)
    ]
    assert offences == []
