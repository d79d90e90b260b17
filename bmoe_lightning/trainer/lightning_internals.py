"""The one border to Lightning's private attributes: each is read in one function here, and nowhere else.

Every function says in which releases of Lightning its attribute was seen. `tests/trainer/test_lightning_internals.py`
runs each of them on a real `Trainer`, so that a release without the attribute fails there, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper
from torch.utils.data import DataLoader


def logged_step(trainer: L.Trainer) -> int:
    """The step under which Lightning logs: optimizer steps, each counted once with several optimizers.

    Reads `fit_loop.epoch_loop._batches_that_stepped` (seen in 2.5.0 to 2.6.6); `trainer.global_step` counts the steps
    of every optimizer.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def is_restoring_checkpoint(trainer: L.Trainer) -> bool:
    """Whether a checkpoint is being restored right now; `trainer.ckpt_path` may be that of an earlier run.

    Reads `_checkpoint_connector._loaded_checkpoint` (seen in 2.5.0 to 2.6.6).
    """
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def before_batch_transfer(module: L.LightningModule, batch: Any, dataloader_idx: int) -> Any:
    """Run the hook `on_before_batch_transfer` of a trainer's datamodule or module, as the trainer's loops do.

    Calls `LightningModule._on_before_batch_transfer` (seen in 2.5.0 to 2.6.6), which finds out whose hook it is.
    """
    return module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)


def setup_validation_data(trainer: L.Trainer) -> None:
    """Make the validation loaders of a trainer that fits, unless they are there; `trainer.val_dataloaders` holds them.

    Calls `fit_loop.epoch_loop.val_loop.setup_data` (seen in 2.5.0 to 2.6.6): during a fit, Lightning makes the loaders
    when it first validates, which may be never.
    """
    trainer.fit_loop.epoch_loop.val_loop.setup_data()


def wrapped_sampler(sampler: Any) -> Any:
    """The user's sampler inside the distributed sampler that Lightning has wrapped around it; None for any other.

    Reads `DistributedSamplerWrapper.dataset._sampler` (seen in 2.5.0 to 2.6.6), and the same of
    `UnrepeatedDistributedSamplerWrapper`.
    """
    wrappers = (DistributedSamplerWrapper, UnrepeatedDistributedSamplerWrapper)
    return vars(sampler.dataset)["_sampler"] if isinstance(sampler, wrappers) else None


def wrapped_samplers(loader: Any) -> list[Any]:
    """The user's samplers that Lightning has wrapped in a loader's own; see `wrapped_sampler`.

    Args:
        loader: A DataLoader, or any other iterable, which has none.
    """
    if not isinstance(loader, DataLoader):
        return []
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    found = [inner for inner in map(wrapped_sampler, samplers) if inner is not None]
    return list({id(inner): inner for inner in found}.values())


@contextmanager
def replaced_fit_loop(trainer: L.Trainer, action: Callable[[], None]) -> Iterator[None]:
    """Have `trainer.fit` make its training loader and then run an action, where it would train.

    Replaces `fit_loop.run` on the instance and calls `fit_loop.setup_data` (seen in 2.5.0 to 2.6.6): what a trainer
    sets up for training is there when the loop runs, and gone when `trainer.fit` returns. Where the action can be
    pickled, strategies that spawn processes can send it to them.
    """
    loop = trainer.fit_loop
    loop.run = partial(_set_up_and_call, loop, action)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del loop.run


def _set_up_and_call(loop: Any, action: Callable[[], None]) -> None:
    loop.setup_data()
    action()
