"""Which examples of a trainer's loader belong to this process, where there are several.

A `DistributedSampler` deals the data set out in turn, and gives some examples twice so that all processes get as many.
Training has to: its steps wait for each other. A sum over the data, or a metric, would count those examples twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning as L
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import (
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
)
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler

from bmoe_lightning.experts.counted_batch import CountedBatch, check_entries
from bmoe_lightning.utils.distributed import gather_examples, shard_size

# Others may put what they repeat anywhere.
_UNDERSTOOD = (
    DistributedSampler,
    DistributedSamplerWrapper,
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
)


@dataclass(frozen=True)
class SamplerShard:
    """This process's part of the first batches of a loader.

    Attributes:
        batch_sampler: of the loader.
        sampler: that deals the examples out.
        num_batches: how many batches each process takes at most.
    """

    batch_sampler: BatchSampler
    sampler: DistributedSampler[Any]
    num_batches: int

    @property
    def size(self) -> int:
        """Examples of this process, none of them another process's too."""
        return self._size(self.sampler.rank)

    @property
    def padded_size(self) -> int:
        """Examples that the trainer's loops see in this process."""
        return min(self.num_batches * self.batch_sampler.batch_size, len(self.sampler))

    @property
    def total(self) -> int:
        """Examples of all processes together."""
        return sum(self._size(rank) for rank in range(self.sampler.num_replicas))

    @contextmanager
    def without_repeats(self) -> Iterator[None]:
        """Let the loader give each example to one process only; a process may then have a batch less, or none."""
        # A last batch that is short for want of a repeated example is no reason to drop it.
        drop_last = self.batch_sampler.drop_last
        self.batch_sampler.sampler = _First(self.sampler, self.size)
        self.batch_sampler.drop_last = False
        try:
            yield
        finally:
            self.batch_sampler.sampler = self.sampler
            self.batch_sampler.drop_last = drop_last

    def counted(self, position: int, batch: Any) -> CountedBatch:
        """Say of a batch of the loader which examples are not another process's too.

        Args:
            position: of the batch, from 0.
            batch: the batch.
        """
        first = position * self.batch_sampler.batch_size
        size = min(self.batch_sampler.batch_size, self.padded_size - first)
        return CountedBatch(batch, max(0, min(size, self.size - first)), size)

    def gather(self, values: Tensor) -> Tensor:
        """Put results of the trainer's loops together, without those of repeated examples. A collective.

        Args:
            values: `[padded_size, ...]`, one entry an example that a loop has seen in this process.

        Returns:
            `[total, ...]` in the order of the sampler, which is that of the data set unless it shuffles.

        Raises:
            ValueError: if there are more or fewer entries than examples.
        """
        check_entries(len(values), self.padded_size)
        return gather_examples(values[: self.size])

    def _size(self, rank: int) -> int:
        own = shard_size(len(self.sampler.dataset), rank, self.sampler.num_replicas)  # type: ignore[arg-type]
        return min(own, self.padded_size)


class _First(Sampler[Any]):
    """The first entries of a sampler."""

    def __init__(self, sampler: Sampler[Any], size: int) -> None:
        self._sampler = sampler
        self._size = size

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._sampler), self._size)

    def __len__(self) -> int:
        return self._size


def find_sampler_shard(trainer: L.Trainer, loader: Any, num_batches: float) -> SamplerShard | None:
    """Find this process's part of a loader of the trainer; None in a trainer of one process.

    Args:
        trainer: whose loader it is, its samplers put in.
        loader: the loader.
        num_batches: how many batches each process takes at most.

    Raises:
        ValueError: if it cannot be told which examples are repeated.
    """
    if trainer.world_size == 1:
        return None
    batch_sampler: Any = getattr(loader, "batch_sampler", None)
    sampler: Any = getattr(batch_sampler, "sampler", None)
    known = isinstance(loader, DataLoader) and type(batch_sampler) is BatchSampler and type(sampler) in _UNDERSTOOD
    if not known or (sampler.num_replicas, sampler.rank) != (trainer.world_size, trainer.global_rank):
        raise ValueError(
            f"on {trainer.world_size} processes each example must be counted once, and for a {type(loader).__name__} "
            f"with the batch sampler {type(batch_sampler).__name__} and the sampler {type(sampler).__name__} it is "
            "unknown which of them are repeated. Use a DataLoader over a data set with a length, with the sampler that "
            "Lightning puts in (use_distributed_sampler=True) or torch.utils.data.DistributedSampler"
        )
    return SamplerShard(batch_sampler, sampler, int(min(num_batches, len(batch_sampler))))


def check_order(share: SamplerShard) -> None:
    """Refuse samplers that each process draws from for itself, so that their examples overlap.

    Raises:
        ValueError: naming the sampler.
    """
    drawn = wrapped_sampler(share.sampler)
    if hasattr(drawn, "generator"):
        raise ValueError(
            f"{type(drawn).__name__} draws another order on each process, so that some examples would be evaluated "
            "twice and others never; evaluate without it"
        )


def wrapped_sampler(sampler: Any) -> Any:
    """The user's sampler that Lightning has wrapped, or None."""
    wrappers = (DistributedSamplerWrapper, UnrepeatedDistributedSamplerWrapper)
    return vars(sampler.dataset)["_sampler"] if isinstance(sampler, wrappers) else None
