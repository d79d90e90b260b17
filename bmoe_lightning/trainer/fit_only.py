"""Run an action with a trainer that is set up as for training, instead of the fit loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from bmoe_lightning.trainer.lightning_internals import replaced_fit_loop

_TUNERS = (BatchSizeFinder, LearningRateFinder)


def fit_only(
    trainer: L.Trainer,
    callback: L.Callback,
    module: L.LightningModule | None,
    action: Callable[[L.Trainer, L.LightningModule], None],
    **data: Any,
) -> None:
    """Set a trainer up as for training (devices, precision, sharding, loaders), and run an action instead of training.

    Args:
        trainer: The trainer; it runs no training step.
        callback: Callback whose hooks must run; it is added to the trainer temporarily if missing.
        module: LightningModule; by default the one attached to the trainer.
        action: Function that runs instead of the fit loop.
        data: Data and checkpoint arguments of `trainer.fit`.

    Raises:
        ValueError: If there is no module.
    """
    module = trainer.lightning_module if module is None else module
    if module is None:
        raise ValueError("the trainer has no module yet; pass module= with the LightningModule")
    host: Any = trainer
    is_added = callback not in host.callbacks
    if is_added:
        host.callbacks.append(callback)
    # They would call the action in place of steps, with limited data, and change the batch size.
    tuners = [(i, other) for i, other in enumerate(host.callbacks) if isinstance(other, _TUNERS)]
    for _, tuner in tuners:
        host.callbacks.remove(tuner)
    steps = trainer.num_sanity_val_steps
    trainer.num_sanity_val_steps = 0
    try:
        with replaced_fit_loop(trainer, partial(_call, action, trainer)):
            trainer.fit(module, **data)
    finally:
        trainer.num_sanity_val_steps = steps
        for index, tuner in tuners:
            host.callbacks.insert(index, tuner)
        if is_added:
            host.callbacks.remove(callback)


def _call(action: Callable[[L.Trainer, L.LightningModule], None], trainer: L.Trainer) -> None:
    action(trainer, trainer.lightning_module)
