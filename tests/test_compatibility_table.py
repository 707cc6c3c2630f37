"""The table of docs/compatibility.md is made from what runs found."""

import importlib.util
import pathlib

TOOL = pathlib.Path(__file__).parent.parent / "tools" / "compatibility_table.py"
CHECKS = ("enables", "merges")


def tool():
    spec = importlib.util.spec_from_file_location("compatibility_table", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(failures=(), held=()):
    part = {"failures": dict(failures), "adapted": 2, "not adaptable": list(held)}
    return {"default": part, "all-linear": {**part, "adapted": 7}}


def test_a_row_says_where_each_check_passed_and_why_not():
    found = {
        "jax": {"ABackbone": entry(held=["Experts is no type"]), "BBackbone": entry()},
        "tensorflow": {"ABackbone": entry({"merges": "AssertionError: relative error 1"})},
        "torch": {"BBackbone": {"not run": "needs torchvision"}},
    }
    page = tool().table(found, CHECKS)
    assert "| `ABackbone` | 2, 7 | J T . | J T(1) . | Experts is no type |" in page
    assert "| `BBackbone` | 2, 7 | J . P(2) | J . P(2) |  |" in page
    assert "\n1. AssertionError: relative error 1\n2. needs torchvision\n" in page
    assert "jax: 2 of 2 run; tensorflow: 0 of 1 run; torch: 0 of 1 run" in page


def test_what_is_not_run_is_not_green():
    module = tool()
    assert module.is_green(entry())
    assert not module.is_green({"not run": "why"})
    assert not module.is_green(entry({"trains": "why"}))
