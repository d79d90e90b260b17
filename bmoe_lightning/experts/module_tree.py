"""The modules and parameters of a model, read without the generators of `nn.Module.modules` and `parameters`.

A prediction goes through all modules several times, and for a single example these generators take longer than all
else that it does outside of the model. They read `Module._modules` and `Module._parameters` (seen in torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_collected: ContextVar[tuple[nn.Module, list[nn.Module]] | None] = ContextVar("modules of a model", default=None)


@contextmanager
def modules_collected(model: nn.Module) -> Iterator[None]:
    """Within this context the modules of a model are collected once; nobody may add or remove one meanwhile."""
    token = _collected.set((model, all_modules(model)))
    try:
        yield
    finally:
        _collected.reset(token)


def all_modules(model: nn.Module) -> list[nn.Module]:
    """A model and the modules in it, each once, in the order of `nn.Module.modules`."""
    collected = _collected.get()
    if collected is not None and collected[0] is model:
        return collected[1]
    found: list[nn.Module] = []
    seen: set[nn.Module | None] = {None}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module in seen or module is None:
            continue
        seen.add(module)
        found.append(module)
        if module._modules:
            waiting.extend(reversed(module._modules.values()))
    return found


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module of a qualified name, as `nn.Module.get_submodule`.

    Raises:
        AttributeError: If there is none.
    """
    found: nn.Module | None = model
    for part in filter(None, name.split(".")):
        found = None if found is None or part not in found._modules else found._modules[part]
    if found is None:
        raise AttributeError(f"{type(model).__name__} has no module {name!r}")
    return found


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module holds itself, without those of the modules in it."""
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def all_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model, each once, in the order of `nn.Module.parameters`."""
    found: dict[int, nn.Parameter] = {}
    for module in all_modules(model):
        if module._parameters:
            for parameter in module._parameters.values():
                if parameter is not None:
                    found[id(parameter)] = parameter
    return list(found.values())
