"""What the callback refuses before time is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from torch import Tensor

from bmoe_lightning.curvature.sketch import check_linear
from bmoe_lightning.experts.fsdp import is_sharded, reshard
from bmoe_lightning.laplace.predictive import MIN_UNLABELLED
from bmoe_lightning.methods.options import FitSettings
from bmoe_lightning.trainer.data_passes import DataPass, restores_checkpoint, shards_weights
from bmoe_lightning.trainer.sampler_shards import check_order, find_sampler_shard
from bmoe_lightning.utils.distributed import gather_number

_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


def check_strategy(trainer: L.Trainer) -> None:
    """Refuse strategies under which a plain forward and backward of the module do not do what they say.

    Raises:
        ValueError: naming the strategy.
    """
    names = _class_names(trainer.strategy)
    sharded = sorted(names & set(_SHARDED))
    if sharded:
        raise ValueError(
            f"BayesianMoECallback does not support {sharded[0]}: its weights are sharded outside of the training "
            "step. Use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1), one device or DDP, or "
            "train first and call fit_posterior on the unsharded model"
        )
    if "ModelParallelStrategy" in names:
        _check_mesh(trainer)
    elif trainer.world_size > 1 and ("DDPStrategy" not in names or "XLAStrategy" in names):
        raise ValueError(
            "BayesianMoECallback runs on several processes with DDP and with ModelParallelStrategy (FSDP2), and the "
            f"trainer has {trainer.world_size} with {type(trainer.strategy).__name__}. Use one of these, or train with "
            "all of them, load the checkpoint in one process and call fit_posterior"
        )


def _check_mesh(trainer: L.Trainer) -> None:
    """Refuse tensor and expert parallelism, which give a process a part of an activation or of the experts."""
    strategy: Any = trainer.strategy
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise ValueError(
            f"ModelParallelStrategy has a tensor-parallel group of {size} processes (by default that is all of a "
            "node's), in which none sees a whole activation. BayesianMoECallback supports sharded weights alone: give "
            f"ModelParallelStrategy(data_parallel_size={trainer.world_size}, tensor_parallel_size=1) and apply "
            "fully_shard in configure_model"
        )


def check_shards(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse to train weights of which every process would have its own version in the end.

    Raises:
        ValueError: naming a parameter.
    """
    if trainer.world_size == 1 or not shards_weights(trainer):
        return
    reshard(module)
    whole = [name for name, p in module.named_parameters() if p.requires_grad and not is_sharded(p)]
    if whole:
        raise ValueError(
            f"{len(whole)} trained parameters are not sharded, {whole[0]!r} for one, and ModelParallelStrategy averages"
            " no gradients of such: processes would end with different models. Call fully_shard on the whole model in "
            "configure_model (on its blocks first), or freeze them"
        )


def check_prediction(trainer: L.Trainer, loaders: Sequence[Any]) -> None:
    """Refuse to predict with sharded weights if some processes would wait in vain for others. A collective.

    Lightning gives every example to one process in a prediction, and repeats none.

    Raises:
        ValueError: naming the numbers of examples, or a loader that does not tell its own.
    """
    for loader in loaders if shards_weights(trainer) else ():
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        # -1 rather than an error at once: the other processes are about to compare too.
        numbers = gather_number(len(sampler) if isinstance(sampler, Sized) else -1)
        if min(numbers) < 0 or len(set(numbers)) > 1:
            found = ", ".join("unknown" if number < 0 else str(number) for number in numbers)
            raise ValueError(
                "processes put sharded weights together in step, so each must predict as many examples, and they have "
                f"{found}. Predict a number of examples that the processes divide, from a DataLoader over a data set "
                "with a length; or use trainer.test, or one process"
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
        share = find_sampler_shard(trainer, loader, math.inf)
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


def check_prior_mean(trainer: L.Trainer, settings: FitSettings, *, known: bool) -> None:
    """Refuse an evidence around weights that were overwritten before anybody saw them.

    Args:
        trainer: at the start of training.
        settings: of the callback.
        known: whether the weights from before fine-tuning are.

    Raises:
        ValueError: if a run is resumed, and the prior mean is gone.
    """
    if settings.needs_prior_mean and not known and restores_checkpoint(trainer):
        raise ValueError(
            "the evidence measures how far fine-tuning moved the experts, and the checkpoint has overwritten the "
            "weights from before: a load_state_dict that does not call torch.nn.Module's goes unnoticed. Build the "
            "model in the module's __init__, use prior_mean='zero', or leave out the methods that need an evidence"
        )


def check_calibration(settings: FitSettings, calibration: DataPass | None, *, trial: bool) -> None:
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
