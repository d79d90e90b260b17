"""Batches with padding examples, which run through the model and are not counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from bmoe_lightning.experts.fsdp import runs_in_lockstep
from bmoe_lightning.utils.distributed import gather_number, tell_all_ranks
from bmoe_lightning.utils.interruption import InterruptedPassError

_NONE = object()
_STOPPED = -1


@dataclass(frozen=True)
class CountedBatch:
    """A batch of which only the first examples are counted.

    A distributed sampler repeats some examples, so that all ranks get equally many. Where weights are sharded the
    repeated ones have to run, since ranks all-gather the weights in lockstep; but they must not be counted twice.

    Attributes:
        batch: Whatever `class_logits` takes.
        num_counted: Number of examples that are counted, 0 or more.
        size: Number of examples.
    """

    batch: Any
    num_counted: int
    size: int


def plain_batch(batch: Any) -> Any:
    """The batch as `class_logits` takes it."""
    return batch.batch if isinstance(batch, CountedBatch) else batch


def count_of(batch: Any, num_examples: int) -> int:
    """The number of examples of a batch that are counted.

    Args:
        batch: The batch, a `CountedBatch` or not.
        num_examples: Number of examples that `class_logits` returned for it.

    Raises:
        ValueError: If that differs from the batch's size.
    """
    if not isinstance(batch, CountedBatch) or batch.num_counted == batch.size:
        return num_examples
    check_entries(num_examples, batch.size)
    return batch.num_counted


def check_entries(num_examples: int, entries: int) -> None:
    """Check that the examples that a distributed sampler repeats can be identified.

    Args:
        num_examples: Number of examples that `class_logits` returned.
        entries: Number of entries of the data set.

    Raises:
        ValueError: If the two differ.
    """
    if num_examples != entries:
        raise ValueError(
            f"class_logits returned {num_examples} examples for {entries} entries of the data set, so it is unknown "
            "which of them the distributed sampler repeats; let one entry be one example, or use one process"
        )


def lockstep(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """Iterate over batches; where weights are sharded, check that all ranks have equally many (a collective a batch).

    Args:
        model: The model.
        batches: The batches of this rank.

    Raises:
        ValueError: If one rank has no batch left and another one has; raised on all ranks.
        OtherRankError: If the batches of another rank raised an `Exception`, or it has failed since the last batch.
        InterruptedPassError: If the batches of another rank raised `KeyboardInterrupt` or `SystemExit`.
    """
    if not runs_in_lockstep(model):
        yield from batches
        return
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator, _NONE)
        except (KeyboardInterrupt, SystemExit):
            gather_number(_STOPPED)
            raise
        except Exception as error:
            tell_all_ranks(error)
            raise
        running = gather_number(int(batch is not _NONE))
        if _STOPPED in running:
            raise InterruptedPassError
        if not all(running):
            break
        yield batch
    if any(running):
        raise ValueError(
            f"{sum(running)} of {len(running)} processes have a batch left and the others have none, but they "
            "all-gather sharded weights in lockstep: give each equally many batches of the same sizes, and mark "
            "padding examples with CountedBatch"
        )
