"""What SECURITY.md promises of the code: nothing that is read can run code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("bmoe_lightning", "recipes") for path in (ROOT / folder).rglob("*.py"))


def calls(path):
    """Every call of a file: its function as text, and its keyword arguments as text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def unsafe(path):
    """The calls of a file that may run code which is read."""
    for function, options in calls(path):
        module, _, name = function.rpartition(".")
        if (
            (function == "torch.load" and options.get("weights_only") != "True")
            or (module in ("pickle", "dill", "joblib", "marshal") and name in ("load", "loads", "Unpickler"))
            or function in ("eval", "exec", "yaml.load", "numpy.load", "np.load", "os.system")
            or options.get("trust_remote_code", "False") != "False"
        ):
            yield function


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_runs_code(path):
    assert list(unsafe(path)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import pickle\npickle.load(open('x'))",
        "import yaml\nyaml.load('x', yaml.Loader)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "eval('1')",
    ],
)
def test_what_does_is_found(tmp_path, code):
    (tmp_path / "file.py").write_text(code)
    assert len(list(unsafe(tmp_path / "file.py"))) == 1
