"""A fingerprint of a model's weights, so that a posterior is never used with different weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import has_shards, local_part, reshard
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.wrappers.accelerate import materialized
from bmoe_lightning.experts.wrappers.names import plain_name
from bmoe_lightning.experts.wrappers.quantised import unusable
from bmoe_lightning.experts.wrappers.transformers import outermost_pretrained
from bmoe_lightning.utils.devices import to_cpu
from bmoe_lightning.utils.distributed import gather_number, num_processes, sum_over_processes

_SAMPLES = 64
# Steps of 2^32 divided by the golden ratio are spread evenly over a matrix, whatever its width.
_STRIDE = 2654435761


def weight_fingerprint(model: nn.Module, layers: Sequence[ExpertLayer]) -> str:
    """Hash a sample of the weights: 64 values of every parameter, and of each expert's part of a fused one.

    Hashing 14 billion weights would take too long, and training changes nearly all entries of a matrix that it changes
    at all. Values are compared as float32, so a checkpoint and its exact copy in a wider dtype agree, while a copy
    rounded to a narrower dtype does not. Of quantised weights only the names are hashed. The names are relative to
    `fingerprinted_module` and without the parts that wrappers add: a model has the same fingerprint inside a
    LightningModule and outside, compiled or not, sharded by FSDP2 or not. A collective, where it is sharded.

    Args:
        model: The model.
        layers: Its expert layers.

    Returns:
        A hexadecimal SHA-256 digest.

    Raises:
        ValueError: If ranks of a sharded model differ in weights that several of them hold.
    """
    reshard(model)
    return _digest(fingerprinted_module(model, layers), sharded=has_shards(model))


def module_fingerprint(module: nn.Module, *, model: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> str:
    """Hash a sample of all parameters of a module, whichever part of it has the experts; see `weight_fingerprint`.

    Args:
        module: The module.
        model: The model that it is a part of, whose weights may be sharded; None if it is none.
        dtype: Dtype to which the values are rounded.
    """
    whole = module if model is None else model
    reshard(whole)
    return _digest(module, sharded=has_shards(whole), dtype=dtype)


def _digest(module: nn.Module, *, sharded: bool, dtype: torch.dtype = torch.float32) -> str:
    digest = hashlib.sha256()
    samples = sorted(_samples(module, sharded=sharded), key=lambda sample: sample[0])
    digest.update("\n".join(f"{name}:{len(values)}" for name, values in samples).encode())
    # In the order of their names, on whatever devices they are.
    joined = joined_samples([values for _, values in samples], sharded=sharded)
    digest.update(joined.to(dtype).float().numpy().tobytes())
    return digest.hexdigest()


def joined_samples(samples: Sequence[Tensor], *, sharded: bool, replicas_agree: bool = True) -> Tensor:
    """Samples of parameters as one float32 tensor `[n]` on the CPU. A collective, if the model is sharded.

    Args:
        samples: What `sample` returned for each parameter.
        sharded: Whether the model is sharded by FSDP2.
        replicas_agree: Whether weights that several ranks hold must be the same on all of them; otherwise those of
            the first one count.

    Raises:
        ValueError: If ranks differ in weights that several of them hold, and must not.
    """
    joined = torch.cat(to_cpu([values.float() for values in samples]))
    return _reduced(*joined.unbind(1), replicas_agree=replicas_agree) if sharded else joined


def _reduced(values: Tensor, here: Tensor, counts: Tensor, *, replicas_agree: bool) -> Tensor:
    """The samples of all ranks, checked for equality where several hold the same. A collective; see `sample`."""
    total = torch.where(counts > 0, values, 0)
    sum_over_processes([total])
    if not replicas_agree:
        return total
    same = (values == total) | (values.isnan() & total.isnan()) | (here == 0)
    differing = sum(gather_number(int(not bool(same.all()))))
    if differing:
        raise ValueError(
            f"{differing} of {num_processes()} processes differ from the others in replicated weights (parameters that "
            "are not sharded, or replicas of sharded ones), whose gradients nothing all-reduces; shard all parameters "
            "with fully_shard, or freeze them"
        )
    return total


def _samples(model: nn.Module, *, sharded: bool) -> Iterator[tuple[str, Tensor]]:
    """The plain name of every parameter, and its sample; see `sample`."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Packed weights are left out: some libraries rewrite them during the forward pass.
            none = torch.empty(0, 3) if sharded else torch.empty(0)
            values = none if unusable(parameter) else sample(materialized(module, name).detach(), sharded=sharded)
            yield plain_name(f"{prefix}.{name}" if prefix else name), values


def fingerprinted_module(model: nn.Module, layers: Sequence[ExpertLayer]) -> nn.Module:
    """The module whose weights are sampled: the transformers model that holds the expert layers, if there is one.

    Of other models it is the smallest module that has all parameters, and so the same inside a LightningModule and
    outside.
    """
    experts = {id(model.get_submodule(layer.module_name)) for layer in layers}
    for candidate in outermost_pretrained(model):
        if experts <= {id(module) for module in candidate.modules()}:
            return candidate
    module = model
    while True:
        children = [child for child in module.children() if next(child.parameters(), None) is not None]
        own = next(module.parameters(recurse=False), None)
        if own is not None or len(children) != 1 or not experts <= {id(part) for part in children[0].modules()}:
            return module
        module = children[0]


def sample(parameter: Tensor, *, sharded: bool) -> Tensor:
    """A sample of the values of a parameter: of every leading entry of a stack of matrices, of every row of a matrix.

    A step may change single rows of an embedding or of a head alone.

    Returns:
        `[n]`, or for a sharded model `[n, 3]`: the values of this rank, whether it holds them, and whether its copy
        is the one that is counted.
    """
    stacked = len(parameter) if parameter.dim() == 3 else 1
    size = parameter.numel() // max(stacked, 1)
    part = local_part(parameter)
    values = part.values
    positions = torch.arange(min(_SAMPLES, size), device=values.device)
    if parameter.dim() == 2 and len(parameter) > _SAMPLES:
        rows, width = torch.arange(len(parameter), device=values.device), parameter.shape[1]
        positions = rows * width + rows * _STRIDE % max(width, 1)
    elif size > _SAMPLES:
        positions = positions * _STRIDE % size
    if not sharded:
        return values.reshape(stacked, -1)[:, positions].flatten()
    firsts = torch.arange(stacked, device=values.device) * size
    places = list(torch.unravel_index((firsts.unsqueeze(1) + positions).flatten(), parameter.shape))
    if not values.numel():
        return torch.zeros(len(places[0]), 3, device=values.device)
    cut = places[part.dim] - part.offset
    here = (cut >= 0) & (cut < values.shape[part.dim])
    places[part.dim] = torch.where(here, cut, 0)
    held = torch.where(here, values[tuple(places)].float(), 0)
    return torch.stack([held, here.float(), (here & part.counts).float()], dim=1)
