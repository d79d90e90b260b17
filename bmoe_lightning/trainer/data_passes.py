"""Passes over a trainer's data outside of its loops, with its own devices, precision, limits and progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import BatchSampler, DataLoader

from bmoe_lightning.trainer.sampler_shards import find_sampler_shard, wrapped_sampler
from bmoe_lightning.utils.distributed import forked_random_state


class DataPass:
    """A data set as the trainer's loops would see it; may be iterated over more than once.

    Args:
        trainer: a trainer whose strategy is set up.
        loader: one loader of the trainer, or any iterable of batches.
        num_batches: how many batches a pass takes.
        description: for the progress bar.
        dataloader_idx: which of several loaders it is, as the module's transfer hooks are told.
        transient: whether the bar goes when a pass is over, as for one of many.
        repeats: on several processes, whether to see the examples that a distributed sampler repeats, as the trainer's
            loops do. Without them a process may have a batch less than another, or none; where the trainer's strategy
            shards weights, they run, but batches say that they do not count (see `CountedBatch`).

    Raises:
        ValueError: if repeated examples shall be left out, and it cannot be told which they are.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        loader: Iterable[Any],
        num_batches: int,
        description: str,
        dataloader_idx: int = 0,
        *,
        transient: bool = False,
        repeats: bool = False,
    ) -> None:
        self._trainer = trainer
        self._loader = loader
        self._num_batches = num_batches
        self._description = description
        self._index = dataloader_idx
        self._transient = transient
        self._order = unchanged_random_state if repeats else reproducible_order
        self._share = None if repeats else find_sampler_shard(trainer, loader, num_batches)
        self._in_step = self._share is not None and shards_weights(trainer)

    def __len__(self) -> int:
        return self._num_batches

    @property
    def num_examples(self) -> int | None:
        """Examples of one pass, on all processes together, or None where that is not known."""
        return _count_examples(self._loader, self._num_batches) if self._share is None else self._share.total

    def __iter__(self) -> Iterator[Any]:
        """Batches on the trainer's device, moved by the module's own transfer hooks.

        Without `repeats` in an order that does not depend on what ran before; see `reproducible_order`.
        """
        trainer = self._trainer
        share = self._share if self._in_step else None
        bar = progress(trainer, self._num_batches, self._description, transient=self._transient)
        with self._order(self._loader), self._without_repeats(), bar as advance:
            for position, batch in enumerate(islice(self._loader, self._num_batches)):
                batch = trainer.precision_plugin.convert_input(batch)
                batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=self._index)
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=self._index)
                yield batch if share is None else share.counted(position, batch)
                advance()

    def _without_repeats(self) -> AbstractContextManager[None]:
        return nullcontext() if self._share is None or self._in_step else self._share.without_repeats()


def restores_checkpoint(trainer: L.Trainer) -> bool:
    """Whether a checkpoint is just being restored; `trainer.ckpt_path` may be that of an earlier run."""
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def shards_weights(trainer: L.Trainer) -> bool:
    """Whether a trainer's processes put weights together while they run, and so have to run the same steps."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


@contextmanager
def unchanged_random_state(loader: Iterable[Any]) -> Iterator[None]:
    """Leave torch's random state, and the loader's own generators, as they were.

    Starting an iteration draws a base seed even where nothing is shuffled; a later training run would see other
    batches.
    """
    generators = _generators(loader)
    states = [(generator, generator.get_state()) for generator in generators]
    with forked_random_state():
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)


@contextmanager
def reproducible_order(loader: Iterable[Any]) -> Iterator[None]:
    """Have a loader give one and the same order, in whatever process and whatever ran before; then undo that.

    Torch's random state and the loader's own generators are seeded with a fixed number, which is also what makes a
    sampler draw the same on every process; samplers that count epochs are at epoch 0. Afterwards all are as they were.
    A sampler or a data set that keeps its state elsewhere may still give another order every time.

    Args:
        loader: a DataLoader, or any iterable of batches, of which only what it draws from torch is known.
    """
    with unchanged_random_state(loader):
        torch.default_generator.manual_seed(0)
        for generator in _generators(loader):
            generator.manual_seed(0)
        if isinstance(loader, DataLoader) and loader.persistent_workers and loader._iterator is not None:
            # The first iteration draws the workers' seed before the order; with the workers there, no other does.
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        counting = [x for x in _samplers(loader) if hasattr(x, "epoch") and hasattr(x, "set_epoch")]
        epochs = [(sampler, sampler.epoch) for sampler in counting]
        for sampler in counting:
            sampler.set_epoch(0)
        try:
            yield
        finally:
            for sampler, epoch in epochs:
                sampler.set_epoch(epoch)


def _samplers(loader: Iterable[Any]) -> list[Any]:
    """All samplers of a loader, those within others too, each once."""
    if not isinstance(loader, DataLoader):
        return []
    inner = getattr(loader.batch_sampler, "sampler", None)
    found = (loader.sampler, loader.batch_sampler, inner, wrapped_sampler(inner))
    return list({id(sampler): sampler for sampler in found}.values())


def _generators(loader: Iterable[Any]) -> list[torch.Generator]:
    """The generators of a loader and its samplers, each once."""
    found = (getattr(owner, "generator", None) for owner in (loader, *_samplers(loader)))
    return list({id(generator): generator for generator in found if generator is not None}.values())


@contextmanager
def progress(
    trainer: L.Trainer, total: int, description: str, *, transient: bool = False
) -> Iterator[Callable[[], None]]:
    """Show progress through the trainer's own bar; silent where there is none, and on all ranks but the first.

    Args:
        trainer: whose bar it is.
        total: number of steps.
        description: what is going on.
        transient: whether the bar goes afterwards.

    Yields:
        A function to call after each step.
    """
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero or not getattr(bar, "is_enabled", True):
        yield lambda: None
    elif isinstance(bar, RichProgressBar) and bar.progress is not None:
        rich = bar.progress
        task = rich.add_task(description, total=total)
        try:
            yield lambda: rich.update(task, advance=1, refresh=True)
        finally:
            if transient:
                rich.remove_task(task)
    elif isinstance(bar, TQDMProgressBar):
        from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

        with Tqdm(total=total, desc=description, leave=not transient, dynamic_ncols=True) as tqdm:
            yield lambda: tqdm.update(1) and None
    else:
        yield lambda: None


def training_pass(trainer: L.Trainer, description: str, max_batches: int | None = None) -> DataPass:
    """The trainer's training data.

    Raises:
        RuntimeError: if the trainer has no training loader, has several, or one without an end and no `max_batches`.
        ValueError: if the trainer has several processes and their examples cannot be told apart.
    """
    loader = trainer.train_dataloader
    if loader is None or isinstance(loader, (dict, list, tuple)):
        raise RuntimeError(
            f"curvature needs one training loader, found {type(loader).__name__}; combine the data in one loader, or "
            "call fit_posterior with batches of your own"
        )
    limit = math.inf if max_batches is None else max_batches
    total = min(trainer.num_training_batches, limit)
    if math.isinf(total):
        raise RuntimeError(
            "the training loader has no length, so a curvature epoch has no end; give the callback curvature_batches=N "
            "or the trainer limit_train_batches=N"
        )
    return DataPass(trainer, loader, int(total), description)


def validation_pass(trainer: L.Trainer, description: str) -> DataPass | None:
    """The trainer's validation data, or None if it has none.

    Raises:
        RuntimeError: if there are several validation loaders.
        ValueError: if the trainer has several processes and their examples cannot be told apart.
    """
    if not trainer.enable_validation:
        return None
    trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loaders = trainer.val_dataloaders
    flat = as_list(loaders)
    if len(flat) > 1:
        raise RuntimeError(
            f"the callback calibrates on the validation loader, and there are {len(flat)}; give it one, or call "
            "fit_posterior with batches of your own"
        )
    counts = trainer.num_val_batches
    if not flat or sum(counts) == 0:
        return None
    if math.isinf(counts[0]):
        raise RuntimeError("the validation loader has no length; give the trainer limit_val_batches=N")
    return DataPass(trainer, flat[0], int(counts[0]), description)


def as_list(loaders: Any) -> list[Any]:
    """The loaders of one kind that a trainer has: none, one, or a list of them."""
    if loaders is None:
        return []
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


def training_examples(trainer: L.Trainer) -> int | None:
    """How many examples a whole training epoch has, on all processes together, or None where that is not known."""
    share = find_sampler_shard(trainer, trainer.train_dataloader, trainer.num_training_batches)
    if share is not None:
        return share.total
    return _count_examples(trainer.train_dataloader, trainer.num_training_batches)


def _count_examples(loader: Any, num_batches: float) -> int | None:
    """How many examples the first batches of a loader hold, or None where that is not known."""
    if not isinstance(loader, DataLoader) or math.isinf(num_batches):
        return None
    batch_sampler = loader.batch_sampler
    if not isinstance(batch_sampler, BatchSampler):  # the data set, or a sampler of its own kind, makes the batches
        return None
    size = int(num_batches) * batch_sampler.batch_size
    # A sampler may draw a part of the data, or some of them more than once.
    sized = next((x for x in (batch_sampler.sampler, loader.dataset) if isinstance(x, Sized)), None)
    return size if sized is None else min(size, len(sized))


@contextmanager
def best_weights(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Have the best checkpoint's weights in the module for a while; the last ones come back afterwards.

    Raises:
        RuntimeError: if the checkpoint callback has saved none.
    """
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not path:
        raise RuntimeError("fit_at='best', but the checkpoint callback has saved no checkpoint")
    # This very run wrote the file, with whatever hyper-parameters the user's module saves.
    best = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
    current = {name: value for name, value in module.state_dict().items() if name in best}
    last = {name: value.detach().to("cpu", copy=True) for name, value in current.items()}
    try:
        # Within: a checkpoint that does not fit is noticed when a part of it has been loaded.
        module.load_state_dict(best, strict=False)
        yield
    finally:
        module.load_state_dict(last, strict=False)
