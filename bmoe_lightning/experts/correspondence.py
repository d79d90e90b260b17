"""Modules of one model in another: a copy, a module that contains it, or a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from bmoe_lightning.experts.wrappers.names import plain_name
from bmoe_lightning.utils.messages import first_names


def corresponding_modules(model: nn.Module, names: Sequence[str], what: str) -> list[list[str]]:
    """Find modules by their names in another model.

    The names may differ in what stands before their common end, in the same way for all, and by wrappers.

    Args:
        model: Any module.
        names: Qualified names in the other model.
        what: What the modules are, in words, for the error messages.

    Returns:
        For each name the names in this model: of a module and its wrappers, outermost first.

    Raises:
        ValueError: If a module is missing, or the modules are found in several places.
    """
    modules: dict[str, list[str]] = {}
    for name in dict(model.named_modules()):
        modules.setdefault(plain_name(name), []).append(name)
    return [modules[name] for name in _corresponding(model, modules, [plain_name(name) for name in names], what)]


def _corresponding(model: nn.Module, modules: Mapping[str, list[str]], wanted: Sequence[str], what: str) -> list[str]:
    """The plain names of the model that correspond to other ones, which differ by one prefix."""
    if not wanted or all(name in modules for name in wanted):
        return list(wanted)
    parts = wanted[0].split(".")
    # The longest common end first. An index in a list of layers is never a part of what may differ.
    for length in range(len(parts), 0, -1):
        prefix, end = parts[:-length], ".".join(parts[-length:])
        if any(part.isdigit() for part in prefix):
            break
        before = "".join(f"{part}." for part in prefix)
        if not all(name.startswith(before) for name in wanted):
            break
        starts = [name.removesuffix(end) for name in modules if name == end or name.endswith(f".{end}")]
        found = [[start + name.removeprefix(before) for name in wanted] for start in starts]
        found = [names for names in found if all(name in modules for name in names)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{type(model).__name__} has several {what} called {wanted[0]!r}, with or without a prefix: "
                f"{first_names(names[0] for names in found)}. Pass the module that holds one of them."
            )
    missing = next(name for name in wanted if name not in modules)
    last = missing.rpartition(".")[2]
    candidates = [name for name in modules if name.rpartition(".")[2] == last]
    raise ValueError(
        f"{type(model).__name__} has no {what} called {missing!r}, with or without a prefix; modules that "
        f"end in {last!r} are: {first_names(candidates)}. Pass the model that was fitted."
    )
