"""Batches in which some examples are there for company: they run through the model and enter no result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
    if num_examples != batch.size:
        raise ValueError(
            f"class_logits gave {num_examples} examples for {batch.size} entries of the data set, so it is unknown "
            "which of them the distributed sampler repeats; let one entry be one example, or use one process"
        )
    return batch.num_counted
