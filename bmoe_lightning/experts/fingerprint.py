"""A fingerprint of a model's weights, so that a posterior is never used with others."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.fsdp import has_shards, local_part, reshard
from bmoe_lightning.experts.layouts.fused import outermost_pretrained
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.wrappers import fetched, plain_name, present, unusable
from bmoe_lightning.utils.distributed import gather_number, num_processes, sum_over_processes

_SAMPLES = 64
# Steps by the golden ratio of 2^32 fall everywhere in a matrix, whatever its width.
_STRIDE = 2654435761


def weight_fingerprint(model: nn.Module, layers: Sequence[ExpertLayer]) -> str:
    """Hash a sample of the weights: 64 values of every parameter, and of each expert's part of a fused one.

    Reading 14 billion weights would take longer than it is worth; training moves practically all entries of a matrix
    that it moves at all. Values are compared as float32, so a checkpoint and its exact copy in a wider dtype agree,
    while a copy rounded to a narrower dtype does not. Of quantised weights the names alone are hashed. What is hashed
    is `fingerprinted_module`, with names relative to it and without what wrappers add to them: a model has the same
    fingerprint inside a LightningModule and outside, compiled or not, sharded by FSDP2 or whole; where it is sharded,
    all processes call this.

    Args:
        model: the model.
        layers: its expert layers.

    Returns:
        A hexadecimal SHA-256 digest.

    Raises:
        ValueError: if the processes of a sharded model differ in weights that several of them hold.
    """
    digest = hashlib.sha256()
    reshard(model)
    sharded = has_shards(model)
    samples = sorted(_samples(fingerprinted_module(model, layers), sharded=sharded), key=lambda sample: sample[0])
    digest.update("\n".join(f"{name}:{len(values)}" for name, values in samples).encode())
    # In the order of their names, wherever they are.
    together = torch.cat(fetched([values.float() for _, values in samples]))
    if sharded:
        together = _put_together(*together.unbind(1))
    digest.update(together.numpy().tobytes())
    return digest.hexdigest()


def _put_together(values: Tensor, here: Tensor, counts: Tensor) -> Tensor:
    """The samples of all processes, after a look at what several of them hold. A collective; see `_sample`."""
    total = torch.where(counts > 0, values, 0)
    sum_over_processes([total])
    same = (values == total) | (values.isnan() & total.isnan()) | (here == 0)
    differing = sum(gather_number(int(not bool(same.all()))))
    if differing:
        raise ValueError(
            f"{differing} of {num_processes()} processes differ from the others in weights that several of them hold "
            "(parameters that are not sharded, or replicas of sharded ones), so there is no one model. Nothing keeps "
            "such parameters equal in training: shard the whole model with fully_shard, or freeze them"
        )
    return total


def _samples(model: nn.Module, *, sharded: bool) -> Iterator[tuple[str, Tensor]]:
    """The name of every parameter, without what wrappers add to it, and some of its values.

    Of a sharded model with whether they are here, and whether they count here; see `_sample`.
    """
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Packed weights are not compared: some libraries pack them anew while they are used.
            none = torch.empty(0, 3) if sharded else torch.empty(0)
            values = none if unusable(parameter) else _sample(present(module, name).detach(), sharded=sharded)
            yield plain_name(f"{prefix}.{name}" if prefix else name), values


def fingerprinted_module(model: nn.Module, layers: Sequence[ExpertLayer]) -> nn.Module:
    """The module whose weights are sampled: the transformers model that holds the expert layers, if there is one.

    For other models it is the smallest module with all expert layers and their routers.
    """
    experts = {id(model.get_submodule(layer.name)) for layer in layers}
    for candidate in outermost_pretrained(model):
        if experts <= {id(module) for module in candidate.modules()}:
            return candidate
    blocks = [layer.name.rpartition(".")[0].split(".") for layer in layers]
    shared = list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*blocks, strict=False)))
    return model.get_submodule(".".join(parts[0] for parts in shared))


def _sample(parameter: Tensor, *, sharded: bool) -> Tensor:
    """Scattered values of a parameter; of every leading entry for a stack of matrices.

    Returns:
        `[n]`, or of a sharded model `[n, 3]`: the values that this process holds, whether it holds them, and whether
        its copy is the one that counts.
    """
    stacked = len(parameter) if parameter.dim() == 3 else 1
    size = parameter.numel() // max(stacked, 1)
    part = local_part(parameter)
    values = part.values
    positions = torch.arange(min(_SAMPLES, size), device=values.device)
    if size > _SAMPLES:
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
