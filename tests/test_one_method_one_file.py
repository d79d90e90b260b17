"""What is particular to a method stands in its file: no other product file knows its name or its class."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import bmoe_lightning
from bmoe_lightning.laplace.predictive import LINKS
from bmoe_lightning.methods.registry import built_in_class_names, built_in_names

ROOT = Path(bmoe_lightning.__file__).parents[1]
METHODS = ROOT / "bmoe_lightning" / "methods"
FILES = sorted(
    path
    for folder in ("bmoe_lightning", "recipes")
    for path in (ROOT / folder).rglob("*.py")
    if METHODS not in path.parents
)
# One of the links is called as the method is.
NAMES = [name for name in built_in_names() if name not in LINKS]


def known_methods(source: str) -> set[str]:
    """Names and classes of methods in the code of a file, its docstrings and comments aside."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            # A word of everyday English only where it is the whole string or an item of a list of names.
            words = re.split(r"[,\s]+", node.value) if " " not in node.value else re.findall(r"\w+_\w+", node.value)
            found |= {name for name in NAMES if name in words}
        for attribute in ("id", "attr", "name", "arg"):
            if getattr(node, attribute, None) in built_in_class_names():
                found.add(getattr(node, attribute))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_other_file_knows_a_method(path):
    default = {"map", "shrunk_temperature", "laplace_lpo"}  # of the argument `methods`
    allowed = default if path.name == "callback.py" else set()
    assert known_methods(path.read_text()) <= allowed


@pytest.mark.parametrize(
    "code",
    [
        'METHODS = "map,laplace_lpo"',
        'if name == "temperature": pass',
        "from bmoe_lightning.methods import LaplaceLPO",
        "methods.MCDropout()",
        'raise ValueError("leave evidence_temperature out")',
    ],
)
def test_a_name_is_noticed(code):
    assert known_methods(code)


def test_every_method_has_a_file_and_a_test_of_its_name():
    for name in built_in_names():
        assert (METHODS / f"{name}.py").is_file()
        tests = {name, "weight_ensemble"} if name.endswith("_ensemble") else {name}
        assert any((ROOT / "tests" / "methods" / f"test_{test}.py").is_file() for test in tests)
