"""Which model families of the installed transformers hold mixture-of-experts layers, read from their source text.

A family is a folder of `transformers/models`. Nothing is imported: importing every model takes a minute.

Three rules tell a MoE family, each on the syntax tree of its `modeling_*.py` files:

1. a class carries the decorator `use_experts_implementation`: the experts interface of transformers 5;
2. a class sizes weights with a *number of experts*: its `__init__` calls a parameter, layer or module-list constructor,
   or loops over a `range`, with a name that contains "experts" (`num_experts`, `n_routed_experts`) among the arguments;
3. the file imports an experts or MoE class from another family's modeling file.

The plural matters: the "action expert" of a robot policy has an `expert_hidden_size` and no number of experts. Wrappers
that make their language model through `AutoModel` hold another family's layers and are not listed themselves.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

INTERFACE_DECORATOR = "use_experts_implementation"
_SIZED_BY = frozenset(
    {"Parameter", "Embedding", "Linear", "ModuleList", "ModuleDict", "empty", "ones", "randn", "range", "zeros"}
)


def families() -> list[str]:
    """Every MoE family of the installed transformers.

    Returns:
        Folder names of `transformers/models`, sorted.

    Raises:
        RuntimeError: if transformers is not installed, or has no families where they are looked for.
    """
    return sorted(_scan(_models_folder()))


def uses_interface(family: str) -> bool:
    """Whether a family's own modeling file sends its experts through transformers' experts interface.

    Args:
        family: a name from `families()`.

    Raises:
        ValueError: if it is no MoE family of the installed transformers.
    """
    found = _scan(_models_folder())
    if family not in found:
        raise ValueError(f"{family!r} is no MoE family of the installed transformers; they are: {', '.join(found)}")
    return found[family]


@cache
def _scan(models: Path) -> dict[str, bool]:
    """Family to whether it uses the interface."""
    found = {}
    for folder in sorted(path for path in models.iterdir() if path.is_dir()):
        sources = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("modeling_*.py"))]
        # Without the word neither rule can hold, and parsing is what takes the time.
        trees = [ast.parse(source) for source in sources if "Experts" in source or "experts" in source]
        classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
        interface = any(_decorated(node) for node in classes)
        if interface or any(_sizes_by_experts(node) for node in classes) or any(map(_borrows_experts, trees)):
            found[folder.name] = interface
    if not found:
        raise RuntimeError(f"no MoE family was found in {models}: has the source layout of transformers changed?")
    return found


def _models_folder() -> Path:
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("transformers is not installed, or not from files; install it with pip")
    return Path(spec.submodule_search_locations[0]) / "models"


def _decorated(node: ast.ClassDef) -> bool:
    return any(INTERFACE_DECORATOR in _names(decorator) for decorator in node.decorator_list)


def _sizes_by_experts(node: ast.ClassDef) -> bool:
    constructors = (item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
    calls = (call for item in constructors for call in ast.walk(item) if isinstance(call, ast.Call))
    return any(_called(call) in _SIZED_BY and any("experts" in name.lower() for name in _names(call)) for call in calls)


def _borrows_experts(tree: ast.Module) -> bool:
    """Whether a modeling file imports an experts class from another family's modeling file."""
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 2)
    return any(
        ".modeling_" in f".{node.module}" and alias.name.endswith(("Experts", "MoE", "SparseMoeBlock", "SparseMLP"))
        for node in imports
        for alias in node.names
    )


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _names(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            yield inner.id
        elif isinstance(inner, ast.Attribute):
            yield inner.attr
