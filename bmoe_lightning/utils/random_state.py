"""Isolation of torch's random state, and reproducible orders of data loaders."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from bmoe_lightning.utils.distributed import num_processes


def forked_random_state() -> AbstractContextManager[None]:
    """`torch.random.fork_rng`, restricted to this process's GPU where there are several processes.

    Reading the random state of another GPU would initialise it, and hold memory there for every process.
    """
    if num_processes() == 1:
        return torch.random.fork_rng()
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.random.fork_rng([torch.cuda.current_device()] if in_use else [])


@contextmanager
def unchanged_random_state(loader: Iterable[Any], samplers: Sequence[Any] = ()) -> Iterator[None]:
    """Restore torch's random state, and that of a loader's generators, afterwards.

    Iterating over a DataLoader draws a base seed even without shuffling; without this context a later training run
    would see other batches.

    Args:
        loader: DataLoader, or any iterable of batches.
        samplers: Further samplers, inside wrappers that hide them.
    """
    generators = _generators(loader, samplers)
    states = [(generator, generator.get_state()) for generator in generators]
    with forked_random_state():
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)


@contextmanager
def reproducible_order(loader: Iterable[Any], samplers: Sequence[Any] = (), *, order: int = 0) -> Iterator[None]:
    """Make a loader's order reproducible and equal in every process; its state is restored afterwards.

    Torch's random state and the loader's generators are seeded with the number of the order, so that a sampler draws
    the same order on every rank; samplers with `set_epoch` are set to the epoch of this number. A sampler or data set
    with another random state may still have a different order every time.

    Args:
        loader: DataLoader, or any iterable of batches, of which only torch's generator is controlled.
        samplers: Further samplers, inside wrappers that hide them.
        order: Number of the order.
    """
    with unchanged_random_state(loader, samplers):
        torch.default_generator.manual_seed(order)
        for generator in _generators(loader, samplers):
            generator.manual_seed(order)
        if isinstance(loader, DataLoader) and _has_workers(loader):
            # The first iteration draws the workers' seed before the order; with persistent workers, no other does.
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        counting = [x for x in _samplers(loader, samplers) if hasattr(x, "epoch") and hasattr(x, "set_epoch")]
        epochs = [(sampler, sampler.epoch) for sampler in counting]
        for sampler in counting:
            sampler.set_epoch(order)
        try:
            yield
        finally:
            for sampler, epoch in epochs:
                sampler.set_epoch(epoch)


def _has_workers(loader: DataLoader[Any]) -> bool:
    """Whether persistent workers of a loader are running already; reads `_iterator` (seen in torch 2.8 to 2.13)."""
    return loader.persistent_workers and loader._iterator is not None


def _samplers(loader: Iterable[Any], samplers: Sequence[Any]) -> list[Any]:
    """All samplers of a loader, nested ones included, each once."""
    if not isinstance(loader, DataLoader):
        return []
    inner = getattr(loader.batch_sampler, "sampler", None)
    found = (loader.sampler, loader.batch_sampler, inner, *samplers)
    return list({id(sampler): sampler for sampler in found}.values())


def _generators(loader: Iterable[Any], samplers: Sequence[Any]) -> list[torch.Generator]:
    """The generators of a loader and of its samplers, each once."""
    found = (getattr(owner, "generator", None) for owner in (loader, *_samplers(loader, samplers)))
    return list({id(generator): generator for generator in found if generator is not None}.values())


@contextmanager
def unchanged_global_random_states() -> Iterator[None]:
    """Restore the global random states of Python, NumPy and torch afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with forked_random_state():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
