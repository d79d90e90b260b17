"""All uses of Lightning's private attributes, one function for each.

Every function documents the releases of Lightning in which its attribute was tested.
`tests/trainer/test_lightning_internals.py` runs each of them on a real `Trainer`, so that a release without the
attribute fails there, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper, _IndexBatchSamplerWrapper
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader


def logged_step(trainer: L.Trainer) -> int:
    """The step that Lightning logs: optimizer steps, counted once for all optimizers.

    Reads `fit_loop.epoch_loop._batches_that_stepped` (tested with 2.5.0 to 2.6.6); `trainer.global_step` counts the
    steps of every optimizer.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def is_restoring_checkpoint(trainer: L.Trainer) -> bool:
    """Whether a checkpoint is being restored now; `trainer.ckpt_path` may be that of an earlier run.

    Reads `_checkpoint_connector._loaded_checkpoint` (tested with 2.5.0 to 2.6.6).
    """
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def before_batch_transfer(module: L.LightningModule, batch: Any, dataloader_idx: int) -> Any:
    """Run the hook `on_before_batch_transfer` of a trainer's datamodule or module, as the trainer's loops do.

    Calls `LightningModule._on_before_batch_transfer` (tested with 2.5.0 to 2.6.6), which selects the hook.
    """
    return module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)


def setup_validation_data(trainer: L.Trainer) -> None:
    """Create the validation loaders of a trainer within a fit, unless they exist, as `trainer.val_dataloaders`.

    Calls `fit_loop.epoch_loop.val_loop.setup_data` (tested with 2.5.0 to 2.6.6): during a fit, Lightning creates
    the loaders when it first validates, which may be never.
    """
    trainer.fit_loop.epoch_loop.val_loop.setup_data()


def combined_loader(loop: Any) -> CombinedLoader | None:
    """The loaders of one of a trainer's evaluation loops with their mode, or None before they are created.

    Reads `_combined_loader` (tested with 2.5.0 to 2.6.6); `trainer.val_dataloaders` has lost the mode.
    """
    found: CombinedLoader | None = loop._combined_loader
    return found


def combining_mode(combined: CombinedLoader) -> str:
    """The mode of combined loaders. Reads `CombinedLoader._mode` (tested with 2.5.0 to 2.6.6)."""
    return str(combined._mode)


def wrapped_sampler(sampler: Any) -> Any:
    """The user's sampler inside the distributed sampler with which Lightning wraps it; None for any other.

    Reads `DistributedSamplerWrapper.dataset._sampler` (tested with 2.5.0 to 2.6.6), and the same of
    `UnrepeatedDistributedSamplerWrapper`.
    """
    wrappers = (DistributedSamplerWrapper, UnrepeatedDistributedSamplerWrapper)
    return vars(sampler.dataset)["_sampler"] if isinstance(sampler, wrappers) else None


def wrapped_samplers(loader: Any) -> list[Any]:
    """The user's samplers that Lightning has wrapped in a loader; see `wrapped_sampler`.

    Args:
        loader: DataLoader, or any other iterable, which has none.
    """
    if not isinstance(loader, DataLoader):
        return []
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    found = [inner for inner in map(wrapped_sampler, samplers) if inner is not None]
    return list({id(inner): inner for inner in found}.values())


def has_batch_indices(loader: Any) -> bool:
    """Whether Lightning knows which entries of the data set each batch of a predict loader has.

    Looks for `_IndexBatchSamplerWrapper` (tested with 2.5.0 to 2.6.6), which it puts around the batch sampler.
    """
    return isinstance(getattr(loader, "batch_sampler", None), _IndexBatchSamplerWrapper)


@contextmanager
def replaced_fit_loop(trainer: L.Trainer, action: Callable[[], None]) -> Iterator[None]:
    """Make `trainer.fit` create its training loader and then run an action instead of training.

    Replaces `fit_loop.run` on the instance and calls `fit_loop.setup_data` (tested with 2.5.0 to 2.6.6): the
    trainer is set up for training when the loop runs, and torn down when `trainer.fit` returns. If the action can be
    pickled, it works with strategies that spawn processes.
    """
    loop = trainer.fit_loop
    loop.run = partial(_set_up_and_call, loop, action)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del loop.run


def call_after_fit_loop(trainer: L.Trainer, callback: L.Callback, action: Callable[[], None]) -> Callable[[], None]:
    """Have `trainer.fit` call a callback's function after its loop, while the trainer is still set up for training.

    Not after a trial run of Lightning's tuner, which takes the callbacks away and leaves other weights.

    Replaces `fit_loop.run` on the instance (tested with 2.5.0 to 2.6.6), unless `replaced_fit_loop` has: the loop calls
    no hook of a callback if a resumed training is already complete.

    Returns:
        Function that restores the loop. Idempotent.
    """
    loop = trainer.fit_loop
    if getattr(loop.run, "func", None) is _set_up_and_call:
        return lambda: None
    loop.run = partial(_run_and_call, loop.run, trainer, callback, action)  # type: ignore[method-assign]
    return partial(vars(loop).pop, "run", None)


def _run_and_call(
    run: Callable[[], None], trainer: L.Trainer, callback: L.Callback, action: Callable[[], None]
) -> None:
    run()
    if callback in getattr(trainer, "callbacks", ()):
        action()


def _set_up_and_call(loop: Any, action: Callable[[], None]) -> None:
    loop.setup_data()
    action()
