"""What the callback refuses before time is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from torch import Tensor

from bmoe_lightning.curvature.sketch import check_linear
from bmoe_lightning.laplace.predictive import MIN_UNLABELLED
from bmoe_lightning.passes import Pass
from bmoe_lightning.settings import FitSettings
from bmoe_lightning.shares import check_order, find_share

_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")


def check_strategy(trainer: L.Trainer) -> None:
    """Refuse strategies under which a plain forward and backward of the module do not do what they say.

    Raises:
        ValueError: naming the strategy.
    """
    names = _class_names(trainer.strategy)
    sharded = sorted(names & set(_SHARDED))
    if sharded:
        raise ValueError(
            f"BayesianMoECallback does not support {sharded[0]} yet: its weights are sharded outside of the "
            "training step. Use one device or DDP, or train first and call fit_posterior on the unsharded model"
        )
    if trainer.world_size > 1 and ("DDPStrategy" not in names or "XLAStrategy" in names):
        raise ValueError(
            f"BayesianMoECallback runs on several processes with DDP only, and the trainer has {trainer.world_size} "
            f"with {type(trainer.strategy).__name__}. Use strategy='ddp', or train with all of them, load the "
            "checkpoint in one process and call fit_posterior"
        )


def check_sketch(trainer: L.Trainer, settings: FitSettings) -> None:
    """Refuse curvature that several processes could not merge.

    Raises:
        ValueError: naming the sketch.
    """
    if trainer.world_size > 1 and settings.needs_posterior:
        check_linear(settings.sketch)


def check_loaders(trainer: L.Trainer, loaders: Sequence[Any]) -> None:
    """Refuse evaluation loaders of which several processes would count examples twice.

    Raises:
        ValueError: naming the loader's samplers.
    """
    for loader in loaders:
        share = find_share(trainer, loader, math.inf)
        if share is not None:
            check_order(share)


def check_later_callbacks(later: Sequence[L.Callback]) -> None:
    """Refuse callbacks after ours that change the weights when training ends.

    Raises:
        ValueError: naming the callback.
    """
    for other in later:
        changes_weights = isinstance(other, (StochasticWeightAveraging, ModelPruning))
        # By name: Lightning before 2.6 has no such class.
        if changes_weights or "WeightAveraging" in _class_names(other):
            raise ValueError(
                f"{type(other).__name__} changes the weights when training ends, so it must come before "
                "BayesianMoECallback in the trainer's callbacks"
            )


def check_calibration(settings: FitSettings, calibration: Pass | None, *, trial: bool) -> None:
    """Refuse a validation split on which the methods could not be fitted when training is over.

    Raises:
        ValueError: if there is none, or it is too small.
    """
    if calibration is None:
        raise ValueError(
            f"{list(settings.methods)} are fitted on a validation split, and the trainer has none (no "
            "validation loader, no validation_step, or limit_val_batches=0). Add one, or ask for "
            "methods=['map', 'laplace_evidence'], which need no held-out data."
        )
    count = calibration.num_examples
    if settings.evidence_temperatures and count is not None and count < MIN_UNLABELLED:
        raise ValueError(
            f"the evidence temperature needs at least {MIN_UNLABELLED} inputs of the validation split, and there "
            f"are {count}; leave evidence_temperature and shrunk_temperature out of the methods"
            + (", which a fast_dev_run with its single batch cannot fit" if trial else "")
        )


def check_loss(trainer: L.Trainer, outputs: Any, batch_idx: int) -> None:
    """Refuse to go on training after a NaN loss: no posterior can be fitted on what follows.

    Looked at as often as the trainer logs, since every look waits for the device.

    Raises:
        ValueError: naming step and epoch.
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    every = max(1, getattr(trainer, "log_every_n_steps", 1))
    if not isinstance(loss, Tensor) or batch_idx % every:
        return
    if bool(loss.detach().isnan().any()):
        raise ValueError(
            f"the training loss is NaN at step {trainer.global_step} (epoch {trainer.current_epoch}), so there will be "
            "nothing to fit a posterior on: lower the learning rate, clip gradients, or use bfloat16 or float32 weights"
        )


def check_snapshots(trainer: L.Trainer, settings: FitSettings, num_kept: int) -> None:
    """Refuse a checkpoint ensemble that training would leave with fewer than two members.

    Args:
        trainer: at the start of training.
        settings: of the callback.
        num_kept: snapshots of an earlier part of the run.

    Raises:
        ValueError: if there are too few epochs.
    """
    epochs = trainer.max_epochs
    if "checkpoint_ensemble" not in settings.methods or epochs is None or epochs < 0 or is_trial(trainer):
        return
    if num_kept + epochs - trainer.current_epoch < 2:
        raise ValueError(
            f"a checkpoint ensemble keeps the weights after each epoch and needs two of them, but max_epochs={epochs}; "
            "train for more epochs, or leave checkpoint_ensemble out of the methods"
        )


def is_trial(trainer: L.Trainer) -> bool:
    """Whether this is a `fast_dev_run`: everything runs, nothing is written."""
    return bool(getattr(trainer, "fast_dev_run", False))


def _class_names(instance: object) -> set[str]:
    return {kind.__name__ for kind in type(instance).__mro__}
