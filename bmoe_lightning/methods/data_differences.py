"""How data differ from those of an existing fit, and what is known of data without a pass over them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader

from bmoe_lightning.experts.counted_batch import plain_batch
from bmoe_lightning.experts.data_record import DataRecord, compared, compared_in_any_order
from bmoe_lightning.experts.logits_contract import NO_LABEL
from bmoe_lightning.utils.distributed import is_rank_zero

_logger = logging.getLogger(__name__)

Split = tuple[Tensor, Tensor | None]
"""Logits `[N, K]` float64 of held-out data, `-inf` for absent classes, and labels `[N]` int64 or None."""


class DataMismatchError(ValueError):
    """The data are others than those of the existing fit."""


def training_difference(known: DataRecord, found: DataRecord) -> str:
    """How training data differ from those of the existing fit; empty if they are the same, or nobody can tell."""
    difference = known.difference(found)
    if not difference or known.max_batches is None:
        return difference
    if bool((known.limits[0] != found.limits[0]).any()):
        log_doubt(
            f"it is unknown whether the training data are those of the existing fit: its curvature is from the "
            f"first {known.max_batches} batches on each of {int(known.limits[0])} processes, and now there are "
            f"{int(found.limits[0])}; use as many to have them compared"
        )
        return ""
    return f"{difference}, or another order, on which it depends what a pass with max_batches sees"


def split_difference(one: Split, other: Split) -> str | None:
    """How a data set differs from another, in any order; empty if it is the same, None if it is too large to tell."""
    known, found = _with_labels(one), _with_labels(other)
    in_order = compared(known, found) if len(known[0]) == len(found[0]) else None
    if in_order == "":
        return ""
    # Where only some examples have another place, the others are in order.
    difference = compared_in_any_order(known, found)
    return difference and (in_order or difference)


def refuse(kind: str, difference: str | None) -> None:
    """Refuse data that differ from those of the existing fit.

    Args:
        kind: `training` or `held-out`.
        difference: How they differ; nothing is refused if it is empty or None.

    Raises:
        DataMismatchError: If they differ.
    """
    if difference:
        raise DataMismatchError(
            f"the {kind} data are not those of the existing fit: {difference}. Pass the data that it was made with, or "
            "fit all methods again, in another folder (dirpath=) or without the existing fit."
        )


def log_doubt(sentence: str) -> None:
    """Log on rank zero that it is unknown whether data are those of the existing fit."""
    if is_rank_zero():
        _logger.warning("%s", sentence)


def num_rows(batches: Any) -> int:
    """Number of entries of all batches if it is known without a pass, else -1."""
    if isinstance(batches, DataLoader):
        sampler = batches.batch_sampler
        if type(sampler) is not BatchSampler or sampler.drop_last or not isinstance(sampler.sampler, Sized):
            return -1
        return len(sampler.sampler)
    if not isinstance(batches, Sequence):
        return -1
    rows = [first_size(batch) for batch in batches]
    return sum(rows) if min(rows, default=0) >= 0 else -1


def first_size(batch: Any) -> int:
    """Size of the first dimension of a batch's first tensor, -1 without one."""
    tensors = (value for value in tree_leaves(plain_batch(batch)) if isinstance(value, Tensor) and value.dim())
    return next((len(tensor) for tensor in tensors), -1)


def iterates_once(data: Any) -> bool:
    """Whether data can be iterated over only once."""
    return isinstance(data, Iterator) or getattr(data, "iterates_once", False)


def _with_labels(split: Split) -> tuple[Tensor, Tensor]:
    logits, labels = split
    return logits, torch.full((len(logits),), NO_LABEL) if labels is None else labels
