"""Batches in which some examples are there for company: they run through the model and enter no result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from bmoe_lightning.experts.fsdp import runs_in_step
from bmoe_lightning.utils.distributed import gather_number

_NONE = object()


@dataclass(frozen=True)
class CountedBatch:
    """A batch of which the first examples alone count.

    A distributed sampler gives some examples twice, so that all processes get as many. Where weights are sharded these
    have to run, since processes put the weights together at the same time; counted they must not be.

    Attributes:
        batch: whatever `class_logits` takes.
        num_counted: how many examples count; 0 or more.
        size: how many examples there are.
    """

    batch: Any
    num_counted: int
    size: int


def plain_batch(batch: Any) -> Any:
    """What `class_logits` takes."""
    return batch.batch if isinstance(batch, CountedBatch) else batch


def count_of(batch: Any, num_examples: int) -> int:
    """How many of the examples that `class_logits` made of a batch count.

    Raises:
        ValueError: if it cannot be told which.
    """
    if not isinstance(batch, CountedBatch) or batch.num_counted == batch.size:
        return num_examples
    check_entries(num_examples, batch.size)
    return batch.num_counted


def check_entries(num_examples: int, entries: int) -> None:
    """Refuse examples of which it cannot be told which ones a distributed sampler has given twice.

    Args:
        num_examples: how many `class_logits` made of them.
        entries: entries of the data set.

    Raises:
        ValueError: if the two differ.
    """
    if num_examples != entries:
        raise ValueError(
            f"class_logits gave {num_examples} examples for {entries} entries of the data set, so it is unknown which "
            "of them the distributed sampler repeats; let one entry be one example, or use one process"
        )


def lockstep(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """Batches for processes that share a model's weights, and so must have as many. A collective at every batch, then.

    Raises:
        ValueError: on all processes, as soon as one has no batch left and another one has.
    """
    if not runs_in_step(model):
        yield from batches
        return
    iterator = iter(batches)
    while True:
        batch = next(iterator, _NONE)
        running = gather_number(int(batch is not _NONE))
        if not all(running):
            break
        yield batch
    if any(running):
        raise ValueError(
            f"{sum(running)} of {len(running)} processes have a batch left and the others have none, but they put "
            "sharded weights together in step: give each as many batches of the same sizes, and say with CountedBatch "
            "which examples are there for that alone"
        )
