"""Peak memory of a computation on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the live storages that were allocated in the context.

    Attributes:
        alive: Bytes that are alive now.
        peak: Largest number of bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage] | None] = {}

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def known(self, tensors: Iterable[Tensor]) -> None:
        """Exclude tensors that were allocated before."""
        for tensor in tensors:
            self._known.setdefault(tensor.untyped_storage()._cdata, None)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def forget(_: object) -> None:
            del self._known[key]
            self.alive -= size

        # Less than half the time of weakref.finalize, which keeps a registry for the interpreter's exit.
        self._known[key] = weakref.ref(storage, forget)
