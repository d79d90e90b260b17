"""The modules and parameters of a model, read without the generators of `nn.Module.modules` and `parameters`.

A prediction goes through all modules several times, and for a single example these generators take longer than all
else that it does outside of the model. They read `Module._modules` and `Module._parameters` (seen in torch 2.13).
"""

from __future__ import annotations

from torch import nn


def all_modules(model: nn.Module) -> list[nn.Module]:
    """A model and the modules in it, each once, in the order of `nn.Module.modules`."""
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


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module holds itself, without those of the modules in it."""
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def all_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model, each once, in the order of `nn.Module.parameters`."""
    found = {id(parameter): parameter for module in all_modules(model) for parameter in own_parameters(module)}
    return list(found.values())
