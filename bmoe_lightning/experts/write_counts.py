"""Whether tensors were written to: torch counts in-place writes."""

from __future__ import annotations

from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import local_part
from bmoe_lightning.experts.wrappers.quantised import unusable


def write_count(tensor: Tensor) -> int:
    """How often a tensor was written to in place; inference tensors have no counter.

    Reads `Tensor._version` (seen in torch 2.13). Writes through `.data` are not counted.
    """
    return 0 if tensor.is_inference() else tensor._version


def weights_state(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Address and write count of every weight of a module, without reading their values; quantised ones are left out.

    Packed weights may be rewritten while they are used.
    """
    parts = [local_part(p).values for p in module.parameters() if unusable(p) is None]
    return tuple((values.data_ptr(), write_count(values)) for values in parts)
