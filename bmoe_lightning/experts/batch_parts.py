"""A batch that does not fit in memory runs in halves, or in halves of these, one after another.

The terms of a covariance, the sums of a curvature pass and logits are of single examples, so parts of a batch have the
same as the batch. What has not fitted is remembered for each model, so that few batches are tried in vain.
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
from bmoe_lightning.experts.logits_contract import ClassLogits, masked_logits, run_class_logits
from bmoe_lightning.experts.model_state import evaluation_mode
from bmoe_lightning.utils.memory import is_out_of_memory
from bmoe_lightning.utils.messages import first_line

T = TypeVar("T")
Work = Literal["curvature pass", "linearised prediction", "forward pass"]
"""What runs on a batch; each needs another amount of memory."""

_logger = logging.getLogger(__name__)
# Of the spread of a row's logits; rounding in bfloat16 is smaller in the median row (see `check_examples`).
_LARGEST_ERROR = 0.5


@dataclass(frozen=True)
class _Failure:
    """An error without its traceback, whose frames would keep the tensors that there was no memory for."""

    error: BaseException


@dataclass(frozen=True)
class _Limit:
    """What does not fit in memory.

    Attributes:
        examples: Number of examples of the parts of a batch that does not fit.
        values: Number of values of the smallest batch that did not fit.
    """

    examples: int
    values: int


_limits: weakref.WeakKeyDictionary[nn.Module, dict[Work, _Limit]] = weakref.WeakKeyDictionary()


def run_in_parts(
    model: nn.Module,
    class_logits: ClassLogits,
    batch: Any,
    run: Callable[[Any], T],
    logits_of: Callable[[T], Tensor],
    *,
    work: Work,
) -> list[T]:
    """Run a batch as a whole or, if it does not fit in memory, in parts of half as many examples, and so on.

    A batch is cut where its tensors, arrays and lists have an entry for each example. Before a model's first batch is
    cut, the logits of a part are compared with those of the batch without a graph, or, where there is no memory for
    these, with those of one example. Nothing is cut where the weights are sharded, since all ranks run equally many
    batches.

    Args:
        model: The model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: Batch as `class_logits` takes it, or a `CountedBatch`.
        run: Function that runs a batch; it has no effect if it raises for lack of memory.
        logits_of: Function that gives the logits `[n, K]` of the counted examples of a result.
        work: What `run` does, for the log.

    Returns:
        The results of the parts, in the order of the examples.

    Raises:
        ValueError: If the batch does not fit and cannot be cut: parts have other logits, or other numbers of examples.
        RuntimeError: Or `MemoryError`, if there is no memory for one example, or for a batch that has no rows.
    """
    if runs_in_lockstep(model):
        return [run(batch)]
    limit = _limits.get(model, {}).get(work)
    if limit is None or num_rows(batch) <= limit.examples or num_values(batch) < limit.values:
        found = _tried(run, batch)
        if not isinstance(found, _Failure):
            return [found]
        size = num_rows(batch)
        most = _halved(size, found)
        if limit is None:
            _check_cut(model, class_logits, batch, size, most)
        _remember(model, work, most, size, num_values(batch))
    else:
        size, most = num_rows(batch), limit.examples
    results: list[T] = []
    begin = 0
    while begin < size:
        end = min(begin + most, size)
        part = _part(batch, begin, end, size)
        tried = _tried(run, part)
        if isinstance(tried, _Failure):
            most = _halved(end - begin, tried)
            _remember(model, work, most, end - begin, num_values(part))
            continue
        expected = part.num_counted if isinstance(part, CountedBatch) else end - begin
        if len(logits_of(tried)) != expected:
            raise _not_cut(size, f"class_logits gives {len(logits_of(tried))} examples for {expected} rows")
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


def _halved(size: int, failure: _Failure) -> int:
    """The number of examples of the next parts, after that many have not fitted."""
    if size < 2:
        raise failure.error
    return (size + 1) // 2


def _remember(model: nn.Module, work: Work, most: int, size: int, values: int) -> None:
    """Keep in mind what has not fitted, and say so."""
    _limits.setdefault(model, {})[work] = _Limit(most, values)
    _logger.warning(
        "%d examples do not fit in memory in a %s: batches of this size run in parts of %d, with the same result; "
        "batches of %d save the attempt",
        size, work, most, most,
    )  # fmt: skip


def _check_cut(model: nn.Module, class_logits: ClassLogits, batch: Any, size: int, most: int) -> None:
    """Check that the first part of a batch has the logits that it has in the batch."""
    # Imported late: serving a posterior needs no transformers.
    from bmoe_lightning.data.padding import row_errors

    def logits(rows: int) -> Tensor:
        part = plain_batch(batch) if rows == size else plain_batch(_part(batch, 0, rows, size))
        with torch.no_grad(), evaluation_mode(model):
            return masked_logits(run_class_logits(class_logits, model, part)[0])

    whole = _tried(logits, size)
    # Where there is no memory for the logits of the batch, those of one example stand for them.
    rows = 1 if isinstance(whole, _Failure) else size
    if rows == most:
        return  # there is nothing to compare with
    try:
        first = logits(most)
        expected = logits(rows) if isinstance(whole, _Failure) else whole
    except Exception as error:
        if isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error):
            return  # smaller parts may fit
        raise _not_cut(size, f"class_logits does not take a part of it ({first_line(error)})") from error
    if len(first) != most or len(expected) != rows:
        raise _not_cut(size, f"class_logits gives {len(first)} examples for {most} rows, and {len(expected)} in all")
    shared = min(rows, most)
    first, expected = first[:shared], expected[:shared]
    same = first.shape == expected.shape and torch.equal(first == -torch.inf, expected == -torch.inf)
    if not same or float(row_errors(first, expected).median()) > _LARGEST_ERROR:
        raise _not_cut(size, "class_logits gives other logits for the same example in a smaller batch")


def _not_cut(size: int, reason: str) -> ValueError:
    return ValueError(
        f"a batch of {size} rows does not fit in memory, and it cannot be cut: {reason}; make batches of fewer examples"
    )


def _part(batch: Any, begin: int, end: int, size: int) -> Any:
    part = batch_rows(plain_batch(batch), range(begin, end), size)
    if not isinstance(batch, CountedBatch):
        return part
    return CountedBatch(part, min(max(batch.num_counted - begin, 0), end - begin), end - begin)


def num_values(batch: Any) -> int:
    """The number of values of all tensors of a batch, from which the memory that it needs grows."""
    return sum(tensor_sizes(batch))


def tensor_sizes(batch: Any) -> list[int]:
    """The number of values of each tensor of a batch."""
    found: list[int] = []

    def see(values: Tensor) -> Tensor:
        found.append(values.numel())
        return values

    copied_containers(plain_batch(batch), see)
    return found


def num_rows(batch: Any) -> int:
    """The number of entries that most tensors, arrays and lists of a batch have; 0 for a batch without any."""
    if isinstance(batch, CountedBatch):
        return batch.size
    sizes: Counter[int] = Counter(_sizes(batch))
    return max(sizes, key=lambda size: sizes[size], default=0)  # of equally many the first


def _sizes(batch: Any, *, is_column: bool = False) -> Iterator[int]:
    if isinstance(batch, (Tensor, np.ndarray)):
        if batch.ndim:
            yield len(batch)
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _sizes(value, is_column=True)
    elif isinstance(batch, (list, tuple)):
        if not any(isinstance(value, (Tensor, np.ndarray)) for value in batch):
            yield len(batch)
        elif not is_column:  # a tensor of each example is not cut
            for value in batch:
                yield from _sizes(value, is_column=True)
    else:
        found: list[int] = []

        def see(values: Tensor) -> Tensor:
            found.extend(_sizes(values))
            return values

        copied_containers(batch, see)
        yield from found
