"""Weights that are sharded with FSDP2 (`torch.distributed.fsdp.fully_shard`), and the shard that this rank holds.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html

Every rank runs all modules on its examples, and each module's weights are all-gathered while it runs. So activations
and gradients are those of one device, and only code that reads the weights themselves handles shards. Tensor and
expert parallelism shard the computation too, and are not supported.

Private attributes of FSDP2 are read at the end of this file.
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
from torch.utils._pytree import tree_leaves

from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.utils.distributed import is_rank_zero, is_running, num_processes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class LocalPart:
    """The shard of a tensor that this rank holds.

    Attributes:
        values: The values; a view, through which they can be written.
        dim: The dimension along which the tensor is sharded; 0 for an unsharded tensor.
        offset: Position of the first value in that dimension.
        counts: Whether this copy enters sums over all ranks; several ranks may hold the same shard.
    """

    values: Tensor
    dim: int
    offset: int
    counts: bool

    def of(self, tensor: Tensor) -> Tensor:
        """The same shard of an unsharded tensor; a tensor of the shard's shape is returned as it is."""
        if tensor.shape == self.values.shape:
            return tensor
        return tensor.narrow(self.dim, self.offset, self.values.shape[self.dim])

    @torch.no_grad()
    def take(self, tensor: Tensor) -> None:
        """Overwrite the values with the same shard of another tensor (see `of`), of any dtype."""
        self.values.copy_(self.of(tensor))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: sharded or replicated by a device mesh."""
    return hasattr(tensor, "placements")


def has_shards(model: nn.Module) -> bool:
    """Whether modules of a model are sharded with FSDP2."""
    return bool(sharded_modules(model))


def runs_in_lockstep(model: nn.Module) -> bool:
    """Whether ranks have to run a model in lockstep, since each of them holds a shard of its weights."""
    return num_processes() > 1 and has_shards(model)


def check_collective(model: nn.Module, *, distributed: bool) -> None:
    """Refuse a fit on each rank by itself if the weights are sharded.

    Args:
        model: The model.
        distributed: Whether all ranks fit one posterior together.

    Raises:
        ValueError: If the weights are sharded and `distributed` is False.
    """
    if runs_in_lockstep(model) and not distributed:
        raise ValueError(
            f"the model's weights are sharded over {num_processes()} processes, and each would fit a posterior to its "
            "shard of the data; call this on all of them with distributed=True"
        )


def sharding_refusal(tensor: Any) -> str | None:
    """The reason why a DTensor is not supported, or None if `fully_shard` has created it."""
    kinds = [type(placement).__name__ for placement in tensor.placements]
    # With replicas, each group of ranks holds all shards (HSDP).
    if kinds not in (["Shard"], ["Replicate", "Shard"]):
        return f"sharded by a parallel plan ({', '.join(kinds)})"
    if tensor.device_mesh.size() != num_processes():
        return f"sharded over {tensor.device_mesh.size()} of {num_processes()} processes"
    return None


def local_part(tensor: Tensor) -> LocalPart:
    """The shard of a tensor that this rank holds; the full tensor if it is not sharded."""
    if not is_sharded(tensor):
        return LocalPart(tensor.detach(), 0, 0, is_rank_zero())
    sharded: Any = tensor.detach()
    mesh, dim = sharded.device_mesh, sharded.placements[-1].dim
    with torch.no_grad():  # or the values would be a view in a graph
        values = sharded.to_local()
    # Sizes as in torch.chunk: all shards are equally large, except for the last ones.
    length = sharded.shape[dim]
    offset = min(mesh.get_local_rank(mesh.ndim - 1) * -(-length // mesh.size(mesh.ndim - 1)), length)
    return LocalPart(values, dim, offset, mesh.ndim == 1 or mesh.get_local_rank(0) == 0)


def full_tensor(tensor: Tensor) -> Tensor:
    """All values of a tensor, all-gathered, detached. A collective, if it is sharded."""
    sharded: Any = tensor.detach()
    full: Tensor = sharded.full_tensor() if is_sharded(tensor) else sharded
    return full


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """All-gather tensors one by one, onto the CPU. A collective, if they are sharded.

    Args:
        tensors: Tensors by name.
        keep: Whether this rank needs the result.

    Returns:
        All of them, or an empty dictionary.
    """
    found = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if keep:
            found[name] = full.cpu()
    return found


def reshard(model: nn.Module) -> None:
    """Reshard all modules of a model: some stay unsharded after their forward pass."""
    for module in sharded_modules(model):
        module.reshard()


@contextmanager
def unsharded_roots(model: nn.Module) -> Iterator[None]:
    """Leave root modules unsharded after a backward pass, for further backward passes through the same graph.

    FSDP2 all-gathers weights again when the backward pass reaches a module's outputs, but finds no tensors in outputs
    of a custom class, which the root module may return; a single backward pass works nevertheless.
    """
    roots: list[Any] = _roots(model) if is_running() else []
    before = [(root, resharding) for root in roots if (resharding := _reshards_after_backward(root)) is not None]
    for root, _ in before:
        root.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    except BaseException:
        leave_forward(model)
        raise
    finally:
        for root, resharding in before:
            root.set_reshard_after_backward(resharding, recurse=False)


def leave_forward(model: nn.Module) -> None:
    """After a forward pass that failed: the next one would continue in the middle of it."""
    roots: list[Any] = _roots(model)
    for root in roots:
        # Older releases lack the method, and it fails before the first forward.
        if hasattr(root, "reset_iter_state") and _has_run(root):
            root.reset_iter_state()


def _roots(module: nn.Module) -> list[nn.Module]:
    if _is_fully_sharded(module):
        return [module]
    return [root for child in module.children() for root in _roots(child)]


def shard_blocks(model: nn.Module, layers: Iterable[ExpertLayer], mesh: DeviceMesh) -> None:
    """Shard a model with FSDP2: each of its blocks, then the remaining weights.

    Args:
        model: The model, on any device; nothing happens if it is sharded already.
        layers: Its expert layers. The blocks are the children of the outermost module lists that contain them.
        mesh: A device mesh with one dimension.
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


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules of a model that `fully_shard` was called for."""
    return [module for module in model.modules() if _is_fully_sharded(module)] if is_running() else []


def _is_fully_sharded(module: nn.Module) -> bool:
    return isinstance(module, _sharded_class())


@cache
def _sharded_class() -> type | tuple[()]:
    """The class that `fully_shard` mixes into a module's class; none if torch was built without torch.distributed."""
    if not dist.is_available():
        return ()
    from torch.distributed.fsdp import FSDPModule

    return FSDPModule


# -- private in FSDP2


def gathering_outputs(output: Any) -> tuple[Tensor, ...]:
    """The tensors in a sharded module's output whose gradients make FSDP2 all-gather its weights in a backward pass.

    They are found by `torch.distributed.fsdp._common_utils.collect_grad_tensors` (seen in torch 2.13); older releases
    flatten the output with pytree.
    """
    try:
        from torch.distributed.fsdp._common_utils import collect_grad_tensors
    except ImportError:
        return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad)
    found: tuple[Tensor, ...] = collect_grad_tensors(output)
    return found


def _reshards_after_backward(module: Any) -> bool | None:
    """The current value of `set_reshard_after_backward` for a module; None if it has no weights outside of blocks.

    There is no public getter. Reads `FSDPModule._get_fsdp_state()._fsdp_param_groups` (seen in torch 2.13), or
    the single `_fsdp_param_group` of older releases, and `reshard_after_backward` of a group.
    """
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    found = [group.reshard_after_backward for group in groups if group is not None]
    return found[0] if found else None


def _has_run(module: Any) -> bool:
    """Whether a module has run since `fully_shard`; reads `_get_fsdp_state()._is_root` (seen in torch 2.13)."""
    return module._get_fsdp_state()._is_root is not None


def unsharded_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `fully_shard` replaced it.

    Reads the bases of the class that `fully_shard` makes: itself, `FSDPModule`, the module's (seen in torch 2.13).
    """
    kind = type(module)
    return kind.__mro__[2] if _is_fully_sharded(module) else kind
