"""Count what would wait for an accelerator."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NAMES = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "bincount", "item", "equal")


class Waits(TorchDispatchMode):
    """Counts the operations whose result decides about a shape or a branch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indexed = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += indexed or any(name.startswith(waits) for waits in _NAMES)
        return func(*args, **(kwargs or {}))
