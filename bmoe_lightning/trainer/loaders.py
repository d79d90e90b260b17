"""The loaders of a trainer: their entries, their first batch, and whether a second pass over them is possible.

Nothing here changes what a loader gives next: samplers and data sets are copied before they are read.
"""

from __future__ import annotations

import copy
import dis
import math
import random
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from types import FunctionType
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from bmoe_lightning.trainer.lightning_internals import combined_loader, combining_mode, wrapped_samplers
from bmoe_lightning.utils.random_state import reproducible_order, unchanged_global_random_states

_OWN_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


@dataclass(frozen=True)
class FirstBatch:
    """The first batch of a loader.

    Attributes:
        batch: The batch, on the CPU.
        entries: Number of entries of the data set in it, or None where it is unknown.
    """

    batch: Any
    entries: int | None


class JoinedLoaders:
    """Loaders that Lightning draws from together (`CombinedLoader` with a mode other than `sequential`).

    Args:
        loaders: Collection of loaders; a batch is the same collection of batches.
        mode: Mode of `CombinedLoader`.
        limits: Maximum number of batches of each loader.
    """

    def __init__(self, loaders: Any, mode: str, limits: Sequence[float]) -> None:
        self._loaders = loaders
        self._mode: Any = mode
        self._limits = list(limits)

    def __iter__(self) -> Iterator[Any]:
        combined = CombinedLoader(self._loaders, self._mode)
        combined.limits = self._limits
        return (batch for batch, _, _ in iter(combined))


def evaluation_loaders(loop: Any) -> tuple[list[Any], list[float]]:
    """The loaders of an evaluation loop in the order of their indices, and the number of batches of each.

    Args:
        loop: A trainer's `validate_loop` or `test_loop`, with its data set up.
    """
    combined, limits = combined_loader(loop), list(loop.max_batches)
    if combined is None:
        return [], []
    mode = combining_mode(combined)
    if mode == "sequential":
        return list(combined.flattened), limits
    return [JoinedLoaders(combined.iterables, mode, limits)], [math.inf]


def first_batch(loader: Any) -> FirstBatch | None:
    """The first batch of a loader, drawn without changing what it gives next; None where that is impossible.

    The sampler is copied, and so are the data set's own attributes and random generators; with worker processes a
    worker of its own loads the batch.

    Args:
        loader: The loader.
    """
    if isinstance(loader, (list, tuple)):
        return FirstBatch(loader[0], None) if loader else None
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return None
    with unchanged_global_random_states():
        if isinstance(loader.dataset, IterableDataset):
            return _first_of_stream(loader)
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        entries = next(iter(_copied_sampler(sampler, loader.dataset)), None)
        if entries is None:
            return None
        if loader.num_workers:
            return FirstBatch(next(iter(_one_worker(loader, entries))), _length(entries))
        return FirstBatch(_fetched(loader, entries), _length(entries))


def count_entries(loader: Any, num_batches: float) -> int | None:
    """Number of entries of the data set in the first batches of a pass, or None where it is unknown.

    Torch's own samplers say how many entries they give. Any other is asked, since its batches may have any size, in the
    reproducible order of the passes over training data.

    Args:
        loader: The loader.
        num_batches: Number of batches.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or math.isinf(num_batches):
        return None
    batch_sampler: Any = loader.batch_sampler
    if batch_sampler is None:
        return None
    if type(batch_sampler) is BatchSampler and type(batch_sampler.sampler) in _OWN_SAMPLERS:
        return min(int(num_batches) * batch_sampler.batch_size, len(batch_sampler.sampler))  # type: ignore[arg-type]
    with unchanged_global_random_states(), reproducible_order(loader, wrapped_samplers(loader)):
        sampled = _copied_sampler(batch_sampler, loader.dataset)
        return sum(_length(entries) or 0 for entries in islice(sampled, int(num_batches)))


def count_batches(loader: Iterable[Any], num_batches: float) -> int | None:
    """Number of batches that a pass has, of at most some; a stream whose length is only claimed is iterated over.

    Args:
        loader: The loader.
        num_batches: Maximum number of batches, infinite for a loader without a length.
    """
    if math.isinf(num_batches):
        return None
    if isinstance(loader, Sized) and not (isinstance(loader, DataLoader) and _claims(loader)):
        return min(int(num_batches), len(loader))
    with unchanged_global_random_states(), reproducible_order(loader, wrapped_samplers(loader)):
        return sum(1 for _ in islice(loader, int(num_batches)))


def iterates_once(loader: Any) -> bool:
    """Whether data can be iterated over only once: a generator, or a data set that reads a stored iterator.

    Args:
        loader: The loader.
    """
    if isinstance(loader, DataLoader):
        return isinstance(loader.dataset, IterableDataset) and _is_spent(loader.dataset)
    return not isinstance(loader, Sequence) and _is_spent(loader)


def _is_spent(data: Any) -> bool:
    """Whether `iter` gives what is left of an iterator rather than a new one."""
    method = getattr(type(data), "__iter__", None)
    if not isinstance(method, FunctionType):  # an iterator of Python's own
        return isinstance(data, Iterator)
    read, written = set(), set()
    for instruction in dis.get_instructions(method):
        if instruction.opname == "STORE_ATTR":
            written.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            read.add(instruction.argval)
    attributes = getattr(data, "__dict__", {})
    stored = {name for name in read - written if isinstance(attributes.get(name), Iterator)}
    calls_own_methods = any(callable(getattr(type(data), name, None)) for name in read)
    returns_itself = isinstance(data, Iterator) and not read and not written and len(method.__code__.co_names) == 0
    return returns_itself or (bool(stored) and not calls_own_methods)


def _claims(loader: DataLoader[Any]) -> bool:
    """Whether a loader's length is what a data set or a batch sampler of the user's says, and nothing that is known."""
    own = type(loader.batch_sampler) is BatchSampler and type(loader.sampler) in _OWN_SAMPLERS
    return isinstance(loader.dataset, IterableDataset) or not (own or loader.batch_sampler is None)


def _copied_sampler(sampler: Any, dataset: Any) -> Iterable[Any]:
    try:
        return copy.deepcopy(sampler, {id(dataset): dataset})
    except Exception:  # noqa: BLE001  (a sampler may hold anything)
        return copy.copy(sampler)


def _copied_data(dataset: Any) -> Any:
    """A data set whose counters and random generators are separate; its data are shared."""
    attributes = getattr(dataset, "__dict__", None)
    if not attributes:
        return dataset
    copied = copy.copy(dataset)
    for name, value in attributes.items():
        if isinstance(value, _GENERATORS):
            vars(copied)[name] = copy.deepcopy(value)
        elif isinstance(value, Dataset):
            vars(copied)[name] = _copied_data(value)
        elif isinstance(value, list) and value and all(isinstance(entry, Dataset) for entry in value):
            vars(copied)[name] = [_copied_data(entry) for entry in value]
    return copied


def _first_of_stream(loader: DataLoader[Any]) -> FirstBatch | None:
    try:
        stream = copy.deepcopy(loader.dataset)
    except Exception:  # noqa: BLE001  (an open file, a generator: what it gives cannot be read twice)
        return None
    size: Any = loader.batch_size
    fresh = DataLoader(stream, size, collate_fn=loader.collate_fn)
    batch = next(iter(fresh), None)
    return None if batch is None else FirstBatch(batch, None)


def _fetched(loader: DataLoader[Any], entries: Any) -> Any:
    dataset: Any = _copied_data(loader.dataset)
    if loader.batch_sampler is None:
        return loader.collate_fn(dataset[entries])
    several = getattr(dataset, "__getitems__", None)
    return loader.collate_fn(several(entries) if several else [dataset[entry] for entry in entries])


def _one_worker(loader: DataLoader[Any], entries: Any) -> DataLoader[Any]:
    """A loader of one batch, with a worker process as the given one has."""
    batches = {"sampler": [entries], "batch_size": None} if loader.batch_sampler is None else {}
    options: dict[str, Any] = batches or {"batch_sampler": [entries]}
    return DataLoader(
        loader.dataset,
        **options,
        num_workers=1,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        timeout=loader.timeout,
        generator=torch.Generator(),
    )


def _length(entries: Any) -> int | None:
    return len(entries) if isinstance(entries, Sized) and not isinstance(entries, (str, bytes, dict)) else None
