"""Collectives over the ranks of torch.distributed's default group.

All ranks must call a collective, in the same order; with a single process it returns its arguments unchanged. Examples
are assigned round-robin, as by `torch.utils.data.DistributedSampler`: of W ranks, rank r has the examples r, r + W,
r + 2 W, ... of the data set.

A rank that fails alone would leave the others waiting in their next collective. Within `failing_together` it joins that
collective to say so: all ranks raise, at their next `gather_number` or at the end of the block. So other collectives
need a `gather_number` before them, by which a rank that failed is known of.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Small tensors are reduced together, large ones without a copy: at most 64 MiB of float32 is copied at a time.
_BUCKET = 1 << 24
_MAX_DIMENSIONS = 8
_MAX_MESSAGE = 2000
_FAILED = -(1 << 62)  # all-gathered instead of a number
_TOLD = "_told_to_all_ranks"  # attribute of an exception


class OtherRankError(RuntimeError):
    """Another rank has failed; the message names the rank and its error."""


def num_processes() -> int:
    """The world size; 1 without torch.distributed."""
    return dist.get_world_size() if is_running() else 1


def process_rank() -> int:
    """The rank of this process; 0 without torch.distributed."""
    return dist.get_rank() if is_running() else 0


def is_rank_zero() -> bool:
    """Whether this is rank zero, which writes files."""
    return process_rank() == 0


def shard_size(total: int, rank: int, world_size: int) -> int:
    """The number of `total` examples that are assigned to a rank."""
    return len(range(rank, total, world_size))


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """All-reduce tensors with a sum, in place; the result has the same bits on all ranks. A collective.

    Args:
        tensors: Tensors of any shapes, which are the same on every rank.
    """
    _in_buckets(tensors, dist.all_reduce)


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Broadcast tensors from rank zero, in place. A collective.

    Args:
        tensors: Tensors of any shapes, which are the same on every rank.
    """
    _in_buckets(tensors, lambda flat: dist.broadcast(flat, src=0))


def barrier() -> None:
    """Wait until every rank calls this. A collective."""
    # The sum is copied to the CPU, which blocks; a barrier of an accelerator's backend may not.
    sum_over_processes([torch.zeros(1)])


def sequential_per_node(action: Callable[[], T]) -> T:
    """Call a function on the ranks of each node, one rank at a time. A collective; nodes are identified by host name.

    The other ranks wait, for as long as the timeout of torch.distributed's group allows; it should be longer than the
    function takes.

    Args:
        action: The function.

    Returns:
        What the function returned on this rank.

    Raises:
        OtherRankError: If the function fails on another rank; on that rank its exception is raised.
    """
    host = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:7])
    hosts = gather_number(host)
    local_rank = hosts[: process_rank()].count(host)
    results = []
    for turn in range(max(hosts.count(other) for other in hosts)):
        with failing_together():
            if turn == local_rank:
                results.append(action())
    return results[0]


def together(action: Callable[[], T], *, distributed: bool = True) -> T:
    """Call a function on every rank; if it fails on any rank, all ranks raise. A collective; see `failing_together`.

    Args:
        action: The function.
        distributed: Whether all ranks of torch.distributed's default group call this; False calls the function only.

    Returns:
        What the function returned on this rank.
    """
    with failing_together(distributed=distributed):
        return action()


@contextmanager
def failing_together(*, distributed: bool = True) -> Iterator[None]:
    """Run a block on every rank; if it raises an `Exception` on any rank, all ranks raise. A collective, at its end.

    The other ranks raise at their next `gather_number` within the block, or at its end. Where a rank may fail before
    another collective, the block must call `gather_number` in between, as calls of a sharded model and backward passes
    through it do (see `bmoe_lightning.experts.sharded_calls`). Blocks may be nested: an error is told once.

    Args:
        distributed: Whether all ranks of torch.distributed's default group run the block; False only runs it.

    Raises:
        OtherRankError: If the block raises on another rank; on that rank its exception is raised.
    """
    if not distributed:
        yield
        return
    try:
        yield
    except Exception as error:
        tell_all_ranks(error)
        raise
    gather_number(0)


def tell_all_ranks(error: Exception) -> None:
    """Tell the other ranks of an error that this rank is about to raise, unless they know. A collective.

    They raise in the `gather_number` that it joins.

    Args:
        error: The error.
    """
    if isinstance(error, OtherRankError) or vars(error).get(_TOLD):
        return
    with suppress(RuntimeError):  # of a process group that is broken, which all ranks see; `error` is the cause
        _first_failure(_gathered(_FAILED), error)
        setattr(error, _TOLD, True)


def gather_number(number: int) -> list[int]:
    """All-gather one integer of every rank, in the order of ranks. A collective.

    Raises:
        OtherRankError: If another rank fails within `failing_together`.
    """
    numbers = _gathered(number)
    if _FAILED in numbers:
        rank, message = _first_failure(numbers)
        raise OtherRankError(f"on rank {rank}: {message}")
    return numbers


def _gathered(number: int) -> list[int]:
    numbers = torch.zeros(num_processes(), dtype=torch.int64)
    numbers[process_rank()] = number
    sum_over_processes([numbers])
    return numbers.tolist()


def _first_failure(numbers: Sequence[int], error: Exception | None = None) -> tuple[int, str]:
    """The first rank that failed, and its error as text. A collective."""
    first = list(numbers).index(_FAILED)
    text = torch.zeros(_MAX_MESSAGE, dtype=torch.int64)
    if process_rank() == first:
        message = f"{type(error).__name__}: {error}".encode()[:_MAX_MESSAGE]
        text[: len(message)] = torch.tensor(list(message))
    sum_over_processes([text])
    return first, bytes(text[text > 0].tolist()).decode(errors="replace")


def gather_examples(tensor: Tensor) -> Tensor:
    """All-gather the ranks' examples, in the order of the data set. A collective.

    Args:
        tensor: Examples of this rank, `[n, ...]`. If n = 0, the other sizes are ignored; the dtype is not.

    Returns:
        `[N, ...]`, on every rank.

    Raises:
        ValueError: If the numbers of examples are not those of a round-robin assignment, or the other sizes differ.
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
            f"the processes have {lengths} examples, which is no round-robin assignment of {total}; use the samplers "
            "that Lightning adds, or DistributedSampler"
        )
    sizes = {tuple(shape[1:]) for shape in shapes if shape[0]}
    if len(sizes) > 1:
        raise ValueError(f"examples have different sizes on different processes: {sorted(sizes)}; make them equal")
    # Rank 0 has the most examples; the padding of other ranks ends up at the very end.
    padded = tensor.new_zeros(lengths[0], *next(iter(sizes), ()), device=device)
    if len(tensor):
        padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total].to(tensor.device)


def is_running() -> bool:
    """Whether torch.distributed's default group exists."""
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    """The device that tensors must be on for the group's backend."""
    if any(name in str(dist.get_backend()) for name in ("gloo", "mpi")):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None, "a backend other than gloo and mpi needs an accelerator"
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _shapes(tensor: Tensor, device: torch.device) -> list[list[int]]:
    """The shapes of a tensor on all ranks."""
    padding = [-1] * (_MAX_DIMENSIONS - tensor.dim())
    padded = torch.tensor([*tensor.shape, *padding], device=device)
    shapes = [torch.empty_like(padded) for _ in range(num_processes())]
    dist.all_gather(shapes, padded)
    return [[size for size in shape.tolist() if size >= 0] for shape in shapes]


def _in_buckets(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Apply an in-place collective to buckets of tensors."""
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
