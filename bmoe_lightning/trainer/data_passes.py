"""Passes over a trainer's data outside of its loops, with its devices, precision, limits and progress bar."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from bmoe_lightning.trainer.lightning_internals import before_batch_transfer, setup_validation_data, wrapped_samplers
from bmoe_lightning.trainer.loaders import count_batches, count_entries, iterates_once
from bmoe_lightning.trainer.progress import progress
from bmoe_lightning.trainer.sampler_shards import find_sampler_shard
from bmoe_lightning.trainer.signals import check_sigterm, deferred_sigint
from bmoe_lightning.utils.random_state import reproducible_order, unchanged_random_state


class DataPass:
    """One epoch over a data set as in the trainer's loops; re-iterable.

    Args:
        trainer: Trainer whose strategy is set up.
        loader: Loader of the trainer, or any iterable of batches.
        num_batches: Maximum number of batches in a pass; infinite for all of a loader without a length.
        description: Text beside the progress bar.
        dataloader_idx: Index of the loader, passed to the module's transfer hooks.
        transient: Whether the progress bar is removed when a pass is over.
        repeats: Whether the examples that a distributed sampler repeats as padding are included, as in the trainer's
            loops. Without them a rank may have one batch fewer than another, or none; where the strategy shards
            weights, ranks run in lockstep on repeated examples too, marked as not counted (see `CountedBatch`).
        order: Number of the order of the data, without `repeats`; see `reproducible_order`.

    Raises:
        ValueError: If `repeats` is False, and it is unknown which examples are repeated.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        loader: Iterable[Any],
        num_batches: float,
        description: str,
        dataloader_idx: int = 0,
        *,
        transient: bool = False,
        repeats: bool = False,
        order: int = 0,
    ) -> None:
        self._trainer = trainer
        self._loader = loader
        self._num_batches = num_batches
        self._description = description
        self._index = dataloader_idx
        self._transient = transient
        self._order = unchanged_random_state if repeats else partial(reproducible_order, order=order)
        self._shard = None if repeats else find_sampler_shard(trainer, loader, num_batches)
        self._lockstep = self._shard is not None and shards_weights(trainer)

    def __len__(self) -> int:
        return int(self._num_batches)

    @property
    def num_entries(self) -> int | None:
        """Number of entries of the data set in one pass, summed over all ranks; None where it is unknown."""
        return count_entries(self._loader, self._num_batches) if self._shard is None else self._shard.total

    @property
    def iterates_once(self) -> bool:
        """Whether the data can be iterated over only once."""
        return iterates_once(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """Batches on the trainer's device, moved by the module's transfer hooks.

        Without `repeats` the order is reproducible; see `reproducible_order`.

        Raises:
            SIGTERMException: Between two batches, if the trainer has received SIGTERM; the exit status is 143.
            KeyboardInterrupt: Likewise after SIGINT.
        """
        trainer = self._trainer
        shard = self._shard if self._lockstep else None
        order = self._order(self._loader, wrapped_samplers(self._loader))
        bar = progress(trainer, self._num_batches, self._description, transient=self._transient)
        with order, self._without_repeats(), bar as advance, deferred_sigint() as check_sigint:
            check_sigterm(trainer)
            limit = None if math.isinf(self._num_batches) else int(self._num_batches)
            for position, batch in enumerate(islice(self._loader, limit)):
                batch = on_device(trainer, batch, self._index)
                yield batch if shard is None else shard.counted(position, batch)
                advance()
                check_sigterm(trainer)
                check_sigint()

    def _without_repeats(self) -> AbstractContextManager[None]:
        return nullcontext() if self._shard is None or self._lockstep else self._shard.without_repeats()


def on_device(trainer: L.Trainer, batch: Any, dataloader_idx: int) -> Any:
    """A batch on the trainer's device, converted and moved by the precision plugin and the module's transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = before_batch_transfer(trainer.lightning_module, batch, dataloader_idx)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)


def shards_weights(trainer: L.Trainer) -> bool:
    """Whether a trainer's strategy shards the weights, so that all ranks must run the same steps in lockstep."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def training_pass(trainer: L.Trainer, description: str, max_batches: int | None = None, *, order: int = 0) -> DataPass:
    """A pass over the trainer's training data.

    Args:
        trainer: Trainer within a fit.
        description: Text beside the progress bar.
        max_batches: Maximum number of batches per rank; None is a full epoch.
        order: Number of the order of the data; see `reproducible_order`.

    Raises:
        RuntimeError: If the trainer has no training loader, has several, or one without a length and no `max_batches`.
        ValueError: If there are several ranks, and it is unknown which examples their samplers repeat.
    """
    loader = trainer.train_dataloader
    if loader is None or isinstance(loader, (dict, list, tuple)):
        raise RuntimeError(
            f"curvature needs one training loader, found {type(loader).__name__}; combine the data in one loader, or "
            "call bmoe_lightning.methods.fit_methods with batches"
        )
    limit = math.inf if max_batches is None else max_batches
    total = min(trainer.num_training_batches, limit)
    if math.isinf(total):
        raise RuntimeError(
            "the training loader has no length, so a curvature epoch never ends; set max_batches=N of the curvature, "
            "or limit_train_batches=N of the trainer"
        )
    return DataPass(trainer, loader, int(total), description, order=order)


def validation_pass(trainer: L.Trainer, description: str) -> DataPass | None:
    """A pass over the trainer's validation data; None if it has none.

    Args:
        trainer: Trainer within a fit.
        description: Text beside the progress bar.

    Raises:
        RuntimeError: If there are several validation loaders, or one without a length.
        ValueError: If there are several ranks, and it is unknown which examples their samplers repeat.
    """
    if not trainer.enable_validation:
        return None
    setup_validation_data(trainer)
    loaders = as_list(trainer.val_dataloaders)
    if len(loaders) > 1:
        raise RuntimeError(
            f"the callback calibrates on one validation loader, and there are {len(loaders)}; combine the data in one "
            "loader, or call bmoe_lightning.methods.fit_methods with batches"
        )
    counts = trainer.num_val_batches
    if not loaders or sum(counts) == 0:
        return None
    if math.isinf(counts[0]):
        raise RuntimeError("the validation loader has no length; set limit_val_batches=N of the trainer")
    return DataPass(trainer, loaders[0], int(counts[0]), description)


def as_list(loaders: Any) -> list[Any]:
    """A trainer's loaders of one stage (none, one, or a collection) as a list, in the order of their indices."""
    return [] if loaders is None else list(CombinedLoader(loaders).flattened)


class TrainerTrainingData:
    """The training data of curvature passes, from a trainer's training loader.

    Args:
        trainer: Trainer within a fit.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = trainer

    def batches(self, max_batches: int | None, description: str = "Curvature", *, order: int = 0) -> DataPass:
        """One pass of at most `max_batches` batches on each rank; see `training_pass`."""
        return training_pass(self._trainer, description, max_batches, order=order)

    @property
    def iterates_once(self) -> bool:
        """Whether the data can be iterated over only once."""
        return iterates_once(self._trainer.train_dataloader)

    def num_examples(self, max_batches: int | None, seen: int) -> int:
        """Number of examples of a training epoch, from those seen in a pass of at most `max_batches` batches.

        An epoch has as many times more examples as it has entries of the data set; where those are unknown (a stream),
        as it has batches.
        """
        trainer = self._trainer
        loader: Any = trainer.train_dataloader
        whole: float = trainer.num_training_batches
        if max_batches is None or whole <= max_batches or math.isinf(whole):
            return seen
        counts = [_entries(trainer, loader, limit) for limit in (whole, max_batches)]
        if None in counts:
            counts = [count_batches(loader, limit) for limit in (whole, max_batches)]
        total, part = counts
        assert total is not None
        assert part
        return round(seen * total / part)


def _entries(trainer: L.Trainer, loader: Any, num_batches: float) -> int | None:
    shard = find_sampler_shard(trainer, loader, num_batches)
    return count_entries(loader, num_batches) if shard is None else shard.total
