"""Parameters that one thread sees replaced by others, while all other threads see the model's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import is_sharded
from bmoe_lightning.experts.threads import model_lock
from bmoe_lightning.experts.wrappers.compiled import eager_code


def is_replaceable(model: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether modules read a parameter as their attribute, so that one thread can see another one.

    Recurrent layers and TorchScript keep references of their own, and FSDP2 sets sharded parameters itself.
    """
    if is_sharded(parameter) or type(parameter) is not nn.Parameter:
        return False
    return not any(
        isinstance(module, (nn.RNNBase, torch.jit.ScriptModule))
        and any(own is parameter for own in module.parameters(recurse=False))
        for module in model.modules()
    )


def replacement(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter like another one, with uninitialised values."""
    with torch.inference_mode(False):
        other = nn.Parameter(torch.empty_like(parameter.detach()), requires_grad=parameter.requires_grad)
    other.__dict__.update(parameter.__dict__)
    return other


@contextmanager
def replaced_parameters(model: nn.Module, replacements: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Replace parameters in all modules that hold them, in this thread alone; the model's lock is held meanwhile.

    Not a value is written, so plain forward passes of other threads use the model's own weights. Code that was compiled
    runs eagerly meanwhile. Moves and casts of the model are applied to the replaced parameters afterwards.

    Args:
        model: The model.
        replacements: The parameters to see instead, each for one for which `is_replaceable`.
    """
    with model_lock(model), eager_code():
        swapped = []
        try:
            for module in model.modules():
                own = module._parameters.items()
                names = {name: replacements[p] for name, p in own if p is not None and p in replacements}
                if names:
                    swapped.append((module, module._parameters))
                    module.__dict__["_parameters"] = _Parameters(module._parameters, names)
            yield
        finally:
            for module, before in swapped:
                seen: Any = module._parameters
                module.__dict__["_parameters"] = seen.restored(before)


class _Parameters(dict[str, Any]):
    """The parameters of a module, some of which this thread sees replaced.

    `nn.Module` reads `_parameters` through the methods below (seen in torch 2.13). What this thread sets and deletes
    under the replaced names, as parametrisations do for a moment, does not reach the model either.
    """

    def __init__(self, served: dict[str, Any], others: Mapping[str, nn.Parameter]) -> None:
        super().__init__(_stored(served))
        self._thread = threading.get_ident()
        nested = served._others if isinstance(served, _Parameters) else {}
        self._others: dict[str, Any] = {**nested, **others}
        self._names = frozenset(self._others)
        self._first = {name: (other.device, other.dtype) for name, other in others.items()}

    def restored(self, before: dict[str, Any]) -> dict[str, Any]:
        """The parameters of before, with all other changes."""
        stored = _stored(self)
        outer = before._others if isinstance(before, _Parameters) else stored
        for name, first in self._first.items():
            other = self._others.get(name)
            if isinstance(other, Tensor) and (other.device, other.dtype) != first:
                outer[name].data = outer[name].data.to(other.device, other.dtype)
        dict.clear(before)
        dict.update(before, stored)
        return before

    def _is_replaced(self, name: object) -> bool:
        return name in self._names and threading.get_ident() == self._thread

    def _view(self) -> dict[str, Any]:
        return {name: self[name] for name in dict.keys(self) if name in self}

    def __contains__(self, name: object) -> bool:
        return name in self._others if self._is_replaced(name) else dict.__contains__(self, name)

    def __getitem__(self, name: str) -> Any:
        return self._others[name] if self._is_replaced(name) else dict.__getitem__(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        if self._is_replaced(name):
            self._others[name] = value
        else:
            dict.__setitem__(self, name, value)

    def __delitem__(self, name: str) -> None:
        if self._is_replaced(name):
            del self._others[name]
        else:
            dict.__delitem__(self, name)

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self and default:
            return default[0]
        value = self[name]
        del self[name]
        return value

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            return default
        return self[name]

    def keys(self) -> Any:
        return self._view().keys()

    def values(self) -> Any:
        return self._view().values()

    def items(self) -> Any:
        return self._view().items()

    def __iter__(self) -> Iterator[str]:
        return iter(self._view())

    def __len__(self) -> int:
        return len(self._view())

    def copy(self) -> dict[str, Any]:
        return self._view()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (self._view(),)


def _stored(parameters: dict[str, Any]) -> dict[str, Any]:
    """The entries of a dictionary as they are stored, which other threads see."""
    return {name: dict.__getitem__(parameters, name) for name in dict.keys(parameters)}
