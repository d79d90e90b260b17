"""The model families with mixture-of-experts layers, found in the source code of transformers and of this library.

A family is a folder of `transformers/models`, with its name, or a file of `bmoe_lightning/models`, with the prefix
`bmoe_lightning.`, which no folder of transformers can have. Nothing is imported: importing every model takes a minute.

A MoE family is found by any of three rules, applied to the syntax trees of its `modeling_*.py` files or its one file:

1. a class carries the decorator `use_experts_implementation`: the experts interface of transformers 5;
2. a class sizes weights with a *number of experts*: its `__init__` calls a parameter, layer or module-list constructor,
   or loops over a `range`, with a name that contains "experts" (`num_experts`, `n_routed_experts`) among the arguments;
3. the file imports an experts or MoE class from another family's modeling file.

The plural matters: the "action expert" of a robot policy has an `expert_hidden_size` and no number of experts. Wrappers
that build their language model with `AutoModel` contain another family's layers and are not listed themselves.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import bmoe_lightning.models

INTERFACE_DECORATOR = "use_experts_implementation"
_OWN_PREFIX = "bmoe_lightning."
_OWN_MODELS = Path(bmoe_lightning.models.__file__).parent
_SIZED_BY = frozenset(
    {"Parameter", "Embedding", "Linear", "ModuleList", "ModuleDict", "empty", "ones", "randn", "range", "zeros"}
)


def families() -> list[str]:
    """Every MoE family: those of the installed transformers, sorted, then those of this library.

    Raises:
        RuntimeError: If transformers is not installed, or its folder of models has no MoE family.
    """
    return [*families_of_transformers(), *own_families()]


def families_of_transformers() -> list[str]:
    """Every MoE family of the installed transformers: folder names of `transformers/models`, sorted.

    Raises:
        RuntimeError: If transformers is not installed, or its folder of models has no MoE family.
    """
    return sorted(_scan(_models_folder()))


def own_families() -> list[str]:
    """Every MoE family of this library, sorted."""
    return sorted(_scan_own())


def is_own(family: str) -> bool:
    """Whether a family is one of this library."""
    return family.startswith(_OWN_PREFIX)


def module_of(family: str) -> str:
    """Qualified name of the module with a family's model classes."""
    if is_own(family):
        return f"bmoe_lightning.models.{family.removeprefix(_OWN_PREFIX)}"
    return f"transformers.models.{family}.modeling_{family}"


def uses_interface(family: str) -> bool:
    """Whether the modeling files of a family use transformers' experts interface.

    Args:
        family: Name from `families()`.

    Raises:
        ValueError: If it is no MoE family.
    """
    found = _scan(_models_folder()) | _scan_own()
    if family not in found:
        raise ValueError(
            f"{family!r} is no MoE family of the installed transformers or this library; they are: {', '.join(found)}"
        )
    return found[family]


@cache
def _scan(models: Path) -> dict[str, bool]:
    """Whether each family of transformers uses the interface, by name."""
    found = {}
    for folder in sorted(path for path in models.iterdir() if path.is_dir()):
        interface = _read(sorted(folder.glob("modeling_*.py")))
        if interface is not None:
            found[folder.name] = interface
    if not found:
        raise RuntimeError(f"no MoE family was found in {models}; update the rules to transformers' source layout")
    return found


@cache
def _scan_own() -> dict[str, bool]:
    found = {path.stem: _read([path]) for path in sorted(_OWN_MODELS.glob("*.py"))}
    return {f"{_OWN_PREFIX}{name}": interface for name, interface in found.items() if interface is not None}


def _read(files: list[Path]) -> bool | None:
    """Whether the experts in some modeling files use the interface; None if there are no experts."""
    sources = [path.read_text(encoding="utf-8") for path in files]
    # Without the word no rule can match, and parsing is slow.
    trees = [ast.parse(source) for source in sources if "Experts" in source or "experts" in source]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    interface = any(_decorated(node) for node in classes)
    is_family = interface or any(_sizes_by_experts(node) for node in classes) or any(map(_borrows_experts, trees))
    return interface if is_family else None


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
