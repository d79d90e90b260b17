"""Weights that FSDP2 (`torch.distributed.fsdp.fully_shard`) spreads over processes: which part of them a process holds.

Every process runs the whole model on examples of its own, and each module's weights are put together while it runs. So
activations and gradients are those of one device, and only what looks at the weights themselves has to know of parts.
Tensor and expert parallelism spread the computation too, and are another matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.utils.distributed import is_rank_zero, num_processes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class LocalPart:
    """The part of a tensor that this process holds.

    Attributes:
        values: these values; a view, through which they can be written.
        dim: the dimension in which the tensor is cut; 0 for a tensor that is here as a whole.
        offset: position of the first value in that dimension.
        counts: whether this copy enters sums over all processes; several processes may hold the same part.
    """

    values: Tensor
    dim: int
    offset: int
    counts: bool

    def of(self, tensor: Tensor) -> Tensor:
        """The same part of a tensor that is here as a whole, or of one that is cut already."""
        if tensor.shape == self.values.shape:
            return tensor
        return tensor.narrow(self.dim, self.offset, self.values.shape[self.dim])

    @torch.no_grad()
    def take(self, tensor: Tensor) -> None:
        """Overwrite the values with the same part of another tensor, as `of` takes it; of any dtype."""
        self.values.copy_(self.of(tensor))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes, in whatever way."""
    return hasattr(tensor, "placements")


def has_shards(model: nn.Module) -> bool:
    """Whether a model's weights are spread over processes."""
    return bool(_sharded_modules(model))


def runs_in_step(model: nn.Module) -> bool:
    """Whether processes have to run a model at the same time, since each holds a part of its weights."""
    return num_processes() > 1 and has_shards(model)


def check_collective(model: nn.Module, *, distributed: bool) -> None:
    """Refuse a fit by one of several processes that share a model's weights.

    Raises:
        ValueError: if it is not called as distributed.
    """
    if runs_in_step(model) and not distributed:
        raise ValueError(
            f"the model's weights are spread over {num_processes()} processes, and each would fit a posterior of its "
            "own share of the data; call this on all of them with distributed=True"
        )


def sharding_refusal(tensor: Any) -> str | None:
    """Why a tensor that is spread over processes is out of reach, or None if `fully_shard` alone has spread it."""
    kinds = [type(placement).__name__ for placement in tensor.placements]
    # With replicas, each group of processes holds the whole (HSDP).
    if kinds not in (["Shard"], ["Replicate", "Shard"]):
        return f"spread over processes by a parallel plan ({', '.join(kinds)})"
    if tensor.device_mesh.size() != num_processes():
        return f"spread over {tensor.device_mesh.size()} of {num_processes()} processes"
    return None


def local_part(tensor: Tensor) -> LocalPart:
    """The part of a tensor that this process holds; all of it, where it is not sharded."""
    if not is_sharded(tensor):
        return LocalPart(tensor.detach(), 0, 0, is_rank_zero())
    sharded: Any = tensor.detach()
    mesh, dim = sharded.device_mesh, sharded.placements[-1].dim
    with torch.no_grad():  # or the values would be a view in a graph
        values = sharded.to_local()
    # As torch.chunk cuts: all parts are of the same size, but for the last ones.
    length = sharded.shape[dim]
    offset = min(mesh.get_local_rank(mesh.ndim - 1) * -(-length // mesh.size(mesh.ndim - 1)), length)
    return LocalPart(values, dim, offset, mesh.ndim == 1 or mesh.get_local_rank(0) == 0)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its parts, detached. A collective, if it is sharded."""
    sharded: Any = tensor.detach()
    together: Tensor = sharded.full_tensor() if is_sharded(tensor) else sharded
    return together


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Put tensors together one by one, on the CPU. A collective, if they are sharded.

    Args:
        tensors: by name.
        keep: whether this process wants them.

    Returns:
        All of them, or none.
    """
    kept = {}
    for name, tensor in tensors.items():
        together = whole(tensor)
        if keep:
            kept[name] = together.cpu()
    return kept


def reshard(model: nn.Module) -> None:
    """Let every module of a model hold its parts again: some keep the whole weights after they ran."""
    for module in _sharded_modules(model):
        module.reshard()


@contextmanager
def unsharded_roots(model: nn.Module) -> Iterator[None]:
    """Keep what lies in no sharded block in one piece after a backward pass, for the next one through the same graph.

    FSDP2 puts weights together again where a backward pass comes by a module's outputs. Those of the outermost module
    may be in a class of the user's own, in which it finds no tensors; one backward pass works all the same.
    """
    roots: list[Any] = _roots(model)
    groups = [group for root in roots for group in _groups(root)]
    before = [group.reshard_after_backward for group in groups]
    for group in groups:
        group.reshard_after_backward = False
    try:
        yield
    except BaseException:
        for root in roots:
            # Or it would go on in the middle of a forward that is over. Older releases of torch have no such method.
            if hasattr(root, "reset_iter_state"):
                root.reset_iter_state()
        raise
    finally:
        for group, resharding in zip(groups, before, strict=True):
            group.reshard_after_backward = resharding


def _roots(module: nn.Module) -> list[nn.Module]:
    if _is_fully_sharded(module):
        return [module]
    return [root for child in module.children() for root in _roots(child)]


def _groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    # Older releases of torch have a single one.
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def unsharded_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `fully_shard` gave it one of its own."""
    kind = type(module)
    return kind.__mro__[2] if _is_fully_sharded(module) else kind


def shard_blocks(model: nn.Module, layers: Iterable[ExpertLayer], mesh: DeviceMesh) -> None:
    """Shard a model with FSDP2: each of its blocks by itself, then what is around them.

    Args:
        model: the model, on any device; nothing happens if it is sharded already.
        layers: its expert layers. The outermost lists of modules that they lie in hold the blocks.
        mesh: the processes, in one dimension.
    """
    from torch.distributed.fsdp import fully_shard

    if has_shards(model):
        return
    modules = dict(model.named_modules())
    lists = {}
    for layer in layers:
        parts = layer.name.split(".")
        above = [".".join(parts[:length]) for length in range(1, len(parts))]
        outermost = next((name for name in above if isinstance(modules[name], nn.ModuleList)), None)
        if outermost is not None:
            lists[outermost] = modules[outermost]
    for blocks in lists.values():
        for block in blocks.children():
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _sharded_modules(model: nn.Module) -> list[Any]:
    """The modules of a model that `fully_shard` was called for."""
    return [module for module in model.modules() if _is_fully_sharded(module)]


def _is_fully_sharded(module: nn.Module) -> bool:
    return isinstance(module, _sharded_class())


@cache
def _sharded_class() -> type | tuple[()]:
    """The class that `fully_shard` adds to a module's; none where torch was built without torch.distributed."""
    if not dist.is_available():
        return ()
    from torch.distributed.fsdp import FSDPModule

    return FSDPModule
