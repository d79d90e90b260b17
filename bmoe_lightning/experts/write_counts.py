"""Detection of in-place writes, which torch counts for each tensor."""

from __future__ import annotations

from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import local_part
from bmoe_lightning.experts.module_tree import all_parameters
from bmoe_lightning.experts.wrappers.quantised import unusable


def write_count(tensor: Tensor) -> int:
    """Number of in-place writes to a tensor; 0 for inference tensors, which have no counter.

    Reads `Tensor._version` (seen in torch 2.13). Writes through `.data` are not counted.
    """
    return 0 if tensor.is_inference() else tensor._version


def weights_state(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Address and write count of every weight of a module, without reading their values.

    Quantised weights are left out: packed ones may be rewritten during the forward pass.
    """
    usable = [parameter for parameter in all_parameters(module) if unusable(parameter) is None]
    parts = [p if type(p) is nn.Parameter else local_part(p).values for p in usable]
    return tuple((values.data_ptr(), write_count(values)) for values in parts)
