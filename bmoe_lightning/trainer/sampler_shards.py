"""The shard of a distributed sampler that belongs to this rank, and which of its examples are padding.

A `DistributedSampler` assigns the examples round-robin and repeats some, so that all ranks have equally many, since
training steps synchronise gradients. A sum over the data, or a metric, would count the repeated examples twice.
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
from bmoe_lightning.trainer.lightning_internals import wrapped_sampler
from bmoe_lightning.trainer.loaders import iterates_itself
from bmoe_lightning.utils.distributed import gather_examples, shard_size

# These repeat examples only at the end; other classes may repeat any.
_SUPPORTED_SAMPLERS = (
    DistributedSampler,
    DistributedSamplerWrapper,
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
)


@dataclass(frozen=True)
class SamplerShard:
    """This rank's shard of the first batches of a loader.

    Attributes:
        batch_sampler: The loader's batch sampler.
        sampler: The distributed sampler in it.
        num_batches: Maximum number of batches per rank.
    """

    batch_sampler: BatchSampler
    sampler: DistributedSampler[Any]
    num_batches: int

    @property
    def size(self) -> int:
        """Number of examples of this rank without repeated ones."""
        return self._size(self.sampler.rank)

    @property
    def padded_size(self) -> int:
        """Number of examples of this rank in the trainer's loops, including repeated ones."""
        return min(self.num_batches * self.batch_sampler.batch_size, len(self.sampler))

    @property
    def total(self) -> int:
        """Number of examples of all ranks, each counted once."""
        return sum(self._size(rank) for rank in range(self.sampler.num_replicas))

    @contextmanager
    def without_repeats(self) -> Iterator[None]:
        """Context in which the loader skips repeated examples; a rank may then have fewer batches than others."""
        # A last batch that is short because repeated examples are skipped must not be dropped.
        drop_last = self.batch_sampler.drop_last
        self.batch_sampler.sampler = _First(self.sampler, self.size)
        self.batch_sampler.drop_last = False
        try:
            yield
        finally:
            self.batch_sampler.sampler = self.sampler
            self.batch_sampler.drop_last = drop_last

    def counted(self, position: int, batch: Any) -> CountedBatch:
        """Mark which examples of a batch are counted, and which are repeated.

        Args:
            position: Position of the batch in the loader, from 0.
            batch: The batch.
        """
        first = position * self.batch_sampler.batch_size
        size = min(self.batch_sampler.batch_size, self.padded_size - first)
        return CountedBatch(batch, max(0, min(size, self.size - first)), size)

    def gather(self, values: Tensor) -> Tensor:
        """All-gather results of the trainer's loops without those of repeated examples. A collective.

        Args:
            values: Results `[padded_size, ...]` of this rank's examples, including repeated ones.

        Returns:
            Results `[total, ...]` in the order of the sampler, which is that of the data set unless it shuffles.

        Raises:
            ValueError: If the numbers of entries and examples differ.
        """
        check_entries(len(values), self.padded_size)
        return gather_examples(values[: self.size])

    def _size(self, rank: int) -> int:
        size = shard_size(len(self.sampler.dataset), rank, self.sampler.num_replicas)  # type: ignore[arg-type]
        return min(size, self.padded_size)


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
    """Find this rank's shard of a trainer's loader; None with a single process.

    Args:
        trainer: The trainer, after it has injected its distributed samplers.
        loader: The loader.
        num_batches: Maximum number of batches per rank.

    Raises:
        ValueError: If it is unknown which examples the loader repeats.
    """
    if trainer.world_size == 1:
        return None
    batch_sampler: Any = getattr(loader, "batch_sampler", None)
    sampler: Any = getattr(batch_sampler, "sampler", None)
    supported = (
        isinstance(loader, DataLoader) and type(batch_sampler) is BatchSampler and type(sampler) in _SUPPORTED_SAMPLERS
    )
    if not supported or (sampler.num_replicas, sampler.rank) != (trainer.world_size, trainer.global_rank):
        raise ValueError(
            f"on {trainer.world_size} ranks each example must be counted once, and for a {type(loader).__name__} "
            f"with the batch sampler {type(batch_sampler).__name__} and the sampler {type(sampler).__name__} it is "
            "unknown which examples are repeated. Use a DataLoader over a data set with a length, with the sampler "
            "that Lightning injects (use_distributed_sampler=True) or torch.utils.data.DistributedSampler."
        )
    if num_batches < len(batch_sampler) and iterates_itself(loader):
        raise ValueError(
            f"{type(loader).__name__} has an __iter__ of its own, so it is unknown which examples the first "
            f"{num_batches} batches have that {trainer.world_size} ranks are to count once. Do without max_batches and "
            "limit_..._batches, or use a DataLoader whose batches are those of its sampler."
        )
    return SamplerShard(batch_sampler, sampler, int(min(num_batches, len(batch_sampler))))


def check_order(shard: SamplerShard) -> None:
    """Check that a sampler has the same order on all ranks, so that their examples do not overlap.

    Raises:
        ValueError: If it does not; the message names the sampler.
    """
    sampler = wrapped_sampler(shard.sampler)
    if hasattr(sampler, "generator"):
        raise ValueError(
            f"{type(sampler).__name__} samples another order on each rank, so some examples would be evaluated twice "
            "and others never; evaluate without it"
        )
