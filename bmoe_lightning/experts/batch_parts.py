"""A batch that does not fit in memory runs in halves, or in halves of these, one after another.

The terms of a covariance, the sums of a curvature pass and logits are of single examples, so parts of a batch have the
same as the batch. Each model remembers how many examples have fitted, so that only one batch is tried in vain.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bmoe_lightning.experts.batch_copies import batch_rows, copied_containers
from bmoe_lightning.experts.counted_batch import CountedBatch, plain_batch
from bmoe_lightning.experts.fsdp import runs_in_lockstep
from bmoe_lightning.utils.memory import is_out_of_memory

T = TypeVar("T")
Work = Literal["curvature pass", "linearised prediction", "forward pass"]
"""What runs on a batch; each needs another amount of memory."""

_logger = logging.getLogger(__name__)
_most_examples: weakref.WeakKeyDictionary[nn.Module, dict[Work, int]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Failure:
    """An error without its traceback, whose frames would keep the tensors that there was no memory for."""

    error: BaseException


def run_in_parts(
    model: nn.Module, batch: Any, run: Callable[[Any], T], count: Callable[[T], int], *, work: Work
) -> list[T]:
    """Run a batch as a whole or, if it does not fit in memory, in parts of half as many examples, and so on.

    A batch is cut where its tensors, arrays and lists have an entry for each example. Nothing is cut where the weights
    are sharded, since all ranks run equally many batches.

    Args:
        model: The model.
        batch: Batch as `class_logits` takes it, or a `CountedBatch`.
        run: Function that runs a batch; it has no effect if it raises for lack of memory.
        count: Function that gives the number of counted examples of a result.
        work: What `run` does, for the log.

    Returns:
        The results of the parts, in the order of the examples.

    Raises:
        ValueError: If parts have other numbers of examples than rows.
        RuntimeError: Or `MemoryError`, if there is no memory for one example, or for a batch that has no rows.
    """
    if runs_in_lockstep(model):
        return [run(batch)]
    most = _most_examples.get(model, {}).get(work)
    if most is None or _num_rows(batch) <= most:
        found = _tried(run, batch)
        if not isinstance(found, _Failure):
            return [found]
        most = _halved(model, work, _num_rows(batch), found)
    size = _num_rows(batch)
    results: list[T] = []
    begin = 0
    while begin < size:
        end = min(begin + most, size)
        part = _part(batch, begin, end, size)
        tried = _tried(run, part)
        if isinstance(tried, _Failure):
            most = _halved(model, work, end - begin, tried)
            continue
        if count(tried) != (part.num_counted if isinstance(part, CountedBatch) else end - begin):
            raise ValueError(
                f"a batch of {size} rows does not fit in memory, and class_logits gives {count(tried)} examples for "
                f"{end - begin} of them, so the batch cannot be cut; make batches of fewer examples"
            )
        results.append(tried)
        begin = end
    return results


def joined_labels(parts: Sequence[Any]) -> Any:
    """Labels as `class_logits` returned them for parts of a batch: tensors are joined; anything else is refused later.

    Args:
        parts: Labels `[n]` of each part, or None.
    """
    return torch.cat(list(parts)) if all(isinstance(part, Tensor) for part in parts) else parts[0]


def _tried(run: Callable[[Any], T], batch: Any) -> T | _Failure:
    try:
        return run(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = _Failure(error.with_traceback(None))
        error.__context__ = error.__cause__ = None
    gc.collect()  # the graph of the batch may be part of a cycle
    return failure


def _halved(model: nn.Module, work: Work, size: int, failure: _Failure) -> int:
    """The number of examples of the next parts, after that many have not fitted."""
    if size < 2:
        raise failure.error
    most = (size + 1) // 2
    _most_examples.setdefault(model, {})[work] = most
    _logger.warning(
        "%d examples do not fit in memory in a %s: batches run in parts of %d, with the same result; batches of %d "
        "save the attempt",
        size, work, most, most,
    )  # fmt: skip
    return most


def _part(batch: Any, begin: int, end: int, size: int) -> Any:
    part = batch_rows(plain_batch(batch), range(begin, end), size)
    if not isinstance(batch, CountedBatch):
        return part
    return CountedBatch(part, min(max(batch.num_counted - begin, 0), end - begin), end - begin)


def num_values(batch: Any) -> int:
    """The number of values of all tensors of a batch, from which the memory that it needs grows."""
    found: list[int] = []

    def see(values: Tensor) -> Tensor:
        found.append(values.numel())
        return values

    copied_containers(plain_batch(batch), see)
    return sum(found)


def _num_rows(batch: Any) -> int:
    """The number of entries that most tensors, arrays and lists of a batch have; 0 for a batch without any."""
    if isinstance(batch, CountedBatch):
        return batch.size
    sizes: Counter[int] = Counter(_sizes(batch))
    return max(sizes, key=lambda size: sizes[size], default=0)  # of equally many the first


def _sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, (Tensor, np.ndarray)):
        if batch.ndim:
            yield len(batch)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _sizes(value)
    elif isinstance(batch, (list, tuple)):
        if any(isinstance(value, (Tensor, np.ndarray, Mapping, list, tuple)) for value in batch):
            for value in batch:
                yield from _sizes(value)
        else:
            yield len(batch)
    else:
        found: list[int] = []

        def see(values: Tensor) -> Tensor:
            found.extend(_sizes(values))
            return values

        copied_containers(batch, see)
        yield from found
