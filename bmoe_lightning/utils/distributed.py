"""Sums and gathers over the processes of a distributed run, through torch.distributed's default group.

What is called a collective here must be called by all processes, in the same order; with one process it leaves its
arguments as they are. Examples are dealt out in turn, as `torch.utils.data.DistributedSampler` does: with W processes,
process r has those at the positions r, r + W, r + 2 W, ... of the whole.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Small tensors travel together, large ones without a copy: at most 64 MiB of float32 is copied at a time.
_BUCKET = 1 << 24
_MAX_DIMENSIONS = 8


def num_processes() -> int:
    """How many processes take part; 1 where nothing is distributed."""
    return dist.get_world_size() if _is_running() else 1


def process_rank() -> int:
    """Which of them this is, counted from 0."""
    return dist.get_rank() if _is_running() else 0


def is_rank_zero() -> bool:
    """Whether this is the process that writes files."""
    return process_rank() == 0


def shard_size(total: int, rank: int, world_size: int) -> int:
    """How many of `total` examples process `rank` has."""
    return len(range(rank, total, world_size))


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Add tensors up over all processes, in place; afterwards all have the same bits. A collective.

    Args:
        tensors: of any shapes, which are the same on every process.
    """
    _in_buckets(tensors, dist.all_reduce)


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with those of the first process, in place. A collective.

    Args:
        tensors: of any shapes, which are the same on every process.
    """
    _in_buckets(tensors, lambda flat: dist.broadcast(flat, src=0))


def barrier() -> None:
    """Return once every process has come here. A collective."""
    # The sum comes back to the CPU, so this waits; a barrier of an accelerator's backend may not.
    sum_over_processes([torch.zeros(1)])


def sequential_per_node(action: Callable[[], T]) -> T:
    """Let the processes of each machine do something, one at a time. A collective; machines are told by their names.

    The others wait for each of them as long as the timeout of torch.distributed's group allows, which should be more
    than the action takes.

    Raises:
        RuntimeError: on all other processes, as soon as the action has failed on one; on that one, whatever it raised.
    """
    host = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:7])
    hosts = gather_number(host)
    own_turn = hosts[: process_rank()].count(host)
    results = []
    for turn in range(max(hosts.count(other) for other in hosts)):
        error = None
        if turn == own_turn:
            try:
                results.append(action())
            except Exception as raised:  # noqa: BLE001  (told to the others, and raised again)
                error = raised
        failed = gather_number(int(error is not None))
        if error is not None:
            raise error
        if any(failed):
            raise RuntimeError(f"process {failed.index(1)} has failed and says why; this one does not go on alone")
    return results[0]


def forked_random_state() -> AbstractContextManager[None]:
    """`torch.random.fork_rng`; on several processes for this process's GPU alone.

    Every other GPU would be opened to read its random state, and hold memory of each process from then on.
    """
    if num_processes() == 1:
        return torch.random.fork_rng()
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.random.fork_rng([torch.cuda.current_device()] if in_use else [])


def gather_number(number: int) -> list[int]:
    """A number of every process, by rank. A collective."""
    numbers = torch.zeros(num_processes(), dtype=torch.int64)
    numbers[process_rank()] = number
    sum_over_processes([numbers])
    return numbers.tolist()


def gather_examples(tensor: Tensor) -> Tensor:
    """Put the processes' examples together again, in the order in which they were dealt out. A collective.

    Args:
        tensor: `[n, ...]`, this process's examples. Where n = 0 the other sizes do not matter; the dtype does.

    Returns:
        `[N, ...]`, on every process.

    Raises:
        ValueError: if the numbers of examples are not those of dealing out in turn, or the other sizes differ.
    """
    world_size = num_processes()
    if world_size == 1:
        return tensor
    device = _device()
    shapes = _shapes(tensor, device)
    lengths = [shape[0] for shape in shapes]
    total = sum(lengths)
    if lengths != [shard_size(total, rank, world_size) for rank in range(world_size)]:
        raise ValueError(
            f"the processes have {lengths} examples, which is not what dealing out {total} in turn gives; use the "
            "samplers that Lightning puts in, or DistributedSampler"
        )
    sizes = {tuple(shape[1:]) for shape in shapes if shape[0]}
    if len(sizes) > 1:
        raise ValueError(f"examples have different sizes on different processes: {sorted(sizes)}")
    # The first process has the most; the others' last row may be missing, and ends up at the very end.
    own = tensor.new_zeros(lengths[0], *next(iter(sizes), ()), device=device)
    if len(tensor):
        own[: len(tensor)] = tensor
    parts = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(parts, own)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total].to(tensor.device)


def _is_running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    """Where tensors must be for the group's backend."""
    if any(name in str(dist.get_backend()) for name in ("gloo", "mpi")):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None, "a backend other than gloo and mpi needs an accelerator"
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _shapes(tensor: Tensor, device: torch.device) -> list[list[int]]:
    """The shape that a tensor has on every process."""
    padding = [-1] * (_MAX_DIMENSIONS - tensor.dim())
    own = torch.tensor([*tensor.shape, *padding], device=device)
    shapes = [torch.empty_like(own) for _ in range(num_processes())]
    dist.all_gather(shapes, own)
    return [[size for size in shape.tolist() if size >= 0] for shape in shapes]


def _in_buckets(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Apply a collective that works in place to several tensors at a time."""
    if num_processes() == 1:
        return
    device = _device()
    with torch.no_grad():
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous() and bucket[0].device == device:
                collective(bucket[0])
                continue
            flat = torch.cat([tensor.detach().reshape(-1).to(device) for tensor in bucket])
            collective(flat)
            for tensor, values in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(values.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of tensors of one dtype with at most `_BUCKET` elements, or of one tensor."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        size = 0
        for tensor in (tensor for tensor in tensors if tensor.dtype == dtype):
            if bucket and size + tensor.numel() > _BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.numel()
        yield bucket
