"""The loaders of a trainer: their entries, their first batch, and whether a second pass over them is possible.

Nothing here changes what a loader gives next: samplers and data sets are copied before they are read.
"""

from __future__ import annotations

import copy
import dis
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FunctionType
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
_ENDLESS = (itertools.count, itertools.cycle, itertools.repeat)
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
    if not isinstance(loader, DataLoader) or iterates_itself(loader):
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
    if not isinstance(loader, DataLoader) or iterates_itself(loader) or math.isinf(num_batches):
        return None
    if isinstance(loader.dataset, IterableDataset):
        return None
    batch_sampler: Any = loader.batch_sampler
    if batch_sampler is None and type(loader.sampler) in _OWN_SAMPLERS:
        return None
    if type(batch_sampler) is BatchSampler and type(batch_sampler.sampler) in _OWN_SAMPLERS:
        return min(int(num_batches) * batch_sampler.batch_size, len(batch_sampler.sampler))  # type: ignore[arg-type]
    with unchanged_global_random_states(), reproducible_order(loader, wrapped_samplers(loader)):
        # A sampler without a batch sampler may give lists of entries, too.
        sampled = _copied_sampler(batch_sampler or loader.sampler, loader.dataset)
        lengths = [_length(entries) for entries in islice(sampled, int(num_batches))]
    return None if None in lengths else sum(length for length in lengths if length is not None)


def count_batches(loader: Iterable[Any], num_batches: float) -> int | None:
    """Number of batches that a pass has, of at most some; a loader whose length is only claimed is iterated over.

    Args:
        loader: The loader.
        num_batches: Maximum number of batches, infinite for a loader without a length.
    """
    if math.isinf(num_batches):
        return None
    if isinstance(loader, Sequence) or (isinstance(loader, DataLoader) and not _claims(loader)):
        return min(int(num_batches), len(loader))
    with unchanged_global_random_states(), reproducible_order(loader, wrapped_samplers(loader)):
        return sum(1 for _ in islice(loader, int(num_batches)))


def iterates_itself(loader: DataLoader[Any]) -> bool:
    """Whether a loader's class has an `__iter__` of its own, so that its batches are not those of its sampler.

    Args:
        loader: The loader.
    """
    return type(loader).__iter__ is not DataLoader.__iter__


def iterates_once(loader: Any) -> bool:
    """Whether data can be iterated over only once: a generator, or a data set that reads a stored iterator.

    Args:
        loader: The loader.
    """
    return _is_spent(loader, set())


def _is_spent(data: Any, seen: set[int]) -> bool:
    """Whether `iter` gives what is left of an iterator rather than a new one; `seen` has ids of objects on the way."""
    if id(data) in seen or isinstance(data, Sequence | torch.Tensor):
        return False
    seen.add(id(data))
    if isinstance(data, DataLoader) and isinstance(data.dataset, IterableDataset) and _is_spent(data.dataset, seen):
        return True
    method = getattr(type(data), "__iter__", None)
    if not isinstance(method, FunctionType):  # an iterator of Python's own
        return isinstance(data, Iterator) and not isinstance(data, _ENDLESS)
    read, written = _attributes_of(data, method)
    if isinstance(data, Iterator) and not read and not written and len(method.__code__.co_names) == 0:
        return True  # returns itself
    attributes = {} if "seek" in read else getattr(data, "__dict__", {})  # a file may be read again
    values = [attributes[name] for name in read - written if name in attributes]
    return any(
        _is_spent(part, seen) for value in values for part in (value if isinstance(value, list | tuple) else [value])
    )


def _attributes_of(data: Any, method: FunctionType) -> tuple[set[str], set[str]]:
    """Names that a method, its inner functions and the methods of the same class that it names read and write."""
    read: set[str] = set()
    written: set[str] = set()
    pending, seen = [method.__code__], set()
    while pending:
        code = pending.pop()
        if code in seen:
            continue
        seen.add(code)
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        for instruction in dis.get_instructions(code):
            if instruction.opname == "STORE_ATTR":
                written.add(instruction.argval)
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                read.add(instruction.argval)
                found = getattr(type(data), instruction.argval, None)
                found = found.fget if isinstance(found, property) else found
                pending += [found.__code__] if isinstance(found, FunctionType) else []
    return read, written


def _claims(loader: DataLoader[Any]) -> bool:
    """Whether a loader's length is what a data set, a sampler or a loader of the user's says, and nothing known."""
    if isinstance(loader.dataset, IterableDataset) or iterates_itself(loader):
        return True
    is_own = loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
    return not (is_own and type(loader.sampler) in _OWN_SAMPLERS)


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
    """Number of entries that a sampler gives at once; None for a single one."""
    if isinstance(entries, (str, bytes, dict)) or (isinstance(entries, torch.Tensor) and not entries.dim()):
        return None
    if isinstance(entries, Iterator):  # given by a copy of the sampler
        return sum(1 for _ in entries)
    return len(entries) if isinstance(entries, Sized) else None
