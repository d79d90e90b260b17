"""Checks of trainer, strategy and data that the callback runs before training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence, Sized
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging

from bmoe_lightning.curvature.sketch import SketchName, check_linear
from bmoe_lightning.experts.fsdp import is_sharded, reshard
from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.needs import Available, check_needs
from bmoe_lightning.trainer.data_passes import shards_weights, training_pass, validation_pass
from bmoe_lightning.trainer.sampler_shards import check_order, find_sampler_shard
from bmoe_lightning.utils.distributed import gather_number

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


def check_strategy(trainer: L.Trainer) -> None:
    """Check that the strategy supports a plain forward and backward pass of the module.

    Raises:
        ValueError: If it does not; the message names the strategy.
    """
    names = _class_names(trainer.strategy)
    sharded = sorted(names & set(_SHARDED))
    if sharded:
        raise ValueError(
            f"BayesianMoECallback does not support {sharded[0]}: its weights are sharded outside of the training "
            "step. Use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1), one device or DDP, or "
            "train first and call fit_posterior on the unsharded model."
        )
    if "ModelParallelStrategy" in names:
        strategy: Any = trainer.strategy
        check_tensor_parallel(strategy.device_mesh)
    elif trainer.world_size > 1 and ("DDPStrategy" not in names or "XLAStrategy" in names):
        raise ValueError(
            "BayesianMoECallback supports several processes with DDP and with ModelParallelStrategy (FSDP2), and the "
            f"trainer has {trainer.world_size} with {type(trainer.strategy).__name__}. Use one of these strategies, or "
            "load the checkpoint of the trained model in one process and call fit_posterior."
        )


def check_tensor_parallel(mesh: DeviceMesh) -> None:
    """Check that there is no tensor parallelism, under which no rank has full activations.

    Args:
        mesh: Device mesh of `ModelParallelStrategy`.

    Raises:
        ValueError: If the tensor-parallel group has several ranks; the message has its size.
    """
    size = mesh["tensor_parallel"].size()
    if size > 1:
        raise ValueError(
            f"ModelParallelStrategy has a tensor-parallel group of {size} processes (by default all of a node's), and "
            "bmoe_lightning supports only sharded weights (FSDP2). Use ModelParallelStrategy(data_parallel_size="
            f"{mesh.size()}, tensor_parallel_size=1), and apply fully_shard in configure_model."
        )


def check_shards(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Check that all trained parameters are sharded, since `ModelParallelStrategy` averages no other gradients.

    Raises:
        ValueError: If one is not; the message names it.
    """
    if trainer.world_size == 1 or not shards_weights(trainer):
        return
    reshard(module)
    unsharded = [name for name, p in module.named_parameters() if p.requires_grad and not is_sharded(p)]
    if unsharded:
        raise ValueError(
            f"{len(unsharded)} trained parameters are not sharded, {unsharded[0]!r} for one, and ModelParallelStrategy "
            "does not average their gradients, so ranks would end with different weights. Call fully_shard on the "
            "root module in configure_model (after its blocks), or freeze them."
        )


def check_prediction(trainer: L.Trainer, loaders: Sequence[Any]) -> None:
    """Check that all ranks predict equally many examples where weights are sharded. A collective.

    Lightning pads no predict loader, so a rank may run out of batches while others wait in an all-gather.

    Raises:
        ValueError: If the numbers of examples differ, or a loader has no length.
    """
    for loader in loaders if shards_weights(trainer) else ():
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        # -1 instead of an error: the other ranks are in the same collective.
        numbers = gather_number(len(sampler) if isinstance(sampler, Sized) else -1)
        if min(numbers) < 0 or len(set(numbers)) > 1:
            found = ", ".join("unknown" if number < 0 else str(number) for number in numbers)
            raise ValueError(
                "ranks all-gather sharded weights in lockstep, so each must predict equally many examples, and they "
                f"have {found}. Predict a multiple of the number of ranks, from a DataLoader over a data set with a "
                "length; or use trainer.test, or one process."
            )


def with_enough_snapshots(methods: Sequence[Method], num_snapshots: int) -> list[Method]:
    """The methods for which a finished training run has enough snapshots.

    Args:
        methods: Methods of the run.
        num_snapshots: Number of snapshots, fewer than expected if training stopped early.

    Warns:
        UserWarning: If methods are skipped; the message names them.
    """
    short = [method.name for method in methods if method.needs.snapshots > num_snapshots]
    if short:
        warnings.warn(
            f"training ended with {num_snapshots} snapshots, too few for {', '.join(short)}: only the "
            "other methods are fitted; remove these, or train for more epochs",
            stacklevel=2,
        )
    return [method for method in methods if method.name not in short]


def check_sketch(trainer: L.Trainer, sketches: Iterable[SketchName]) -> None:
    """Check that the curvature sketches can be summed over ranks.

    Args:
        trainer: The trainer.
        sketches: Sketches of the run.

    Raises:
        ValueError: If there are several ranks and a sketch is not linear.
    """
    if trainer.world_size > 1:
        for sketch in sketches:
            check_linear(sketch)


def check_data(trainer: L.Trainer, methods: Sequence[Method]) -> None:
    """Check that methods can be fitted on the training and validation data.

    Args:
        trainer: Trainer within a fit, with its training loader set up.
        methods: Methods to fit.

    Raises:
        RuntimeError: If a loader does not support a pass outside of the loops; see `training_pass`.
        NeedsError: If there are no or too few held-out inputs.
        ValueError: If there are several ranks, and it is unknown which examples their samplers repeat.
    """
    for curvature in (curvature for method in methods for curvature in method.curvatures if curvature.collects):
        training_pass(trainer, "Curvature", curvature.max_batches)
    if any(method.needs.calibration for method in methods):
        calibration = validation_pass(trainer, "Calibration")
        count = 0 if calibration is None else calibration.num_examples
        check_needs(methods, Available(calibration_inputs=count, runs=True))


def check_loaders(trainer: L.Trainer, loaders: Sequence[Any]) -> None:
    """Check that several ranks would not count examples of evaluation loaders twice.

    Raises:
        ValueError: If they would; the message names the loader's sampler.
    """
    for loader in loaders:
        shard = find_sampler_shard(trainer, loader, math.inf)
        if shard is not None:
            check_order(shard)


def check_later_callbacks(later: Sequence[L.Callback]) -> None:
    """Check that no later callback changes the weights at the end of training, after the posterior was fitted.

    Args:
        later: Callbacks after `BayesianMoECallback` in the trainer's list.

    Raises:
        ValueError: If one does; the message names it.
    """
    for other in later:
        changes_weights = isinstance(other, (StochasticWeightAveraging, ModelPruning))
        # By name: Lightning before 2.6 does not have the class.
        if changes_weights or "WeightAveraging" in _class_names(other):
            raise ValueError(
                f"{type(other).__name__} changes the weights when training ends, after the posterior was fitted; put "
                "it before BayesianMoECallback in the trainer's callbacks"
            )


def check_fit_at(trainer: L.Trainer, fit_at: str) -> None:
    """Check that the strategy supports `fit_at`.

    Raises:
        ValueError: If `fit_at` is `best`, which reads an unsharded checkpoint, and the strategy shards weights.
    """
    if fit_at == "best" and shards_weights(trainer):
        raise ValueError(
            "fit_at='best' reads a checkpoint of unsharded weights, and ModelParallelStrategy shards them; use "
            "fit_at='last', or load the best weights in one process and call fit_posterior"
        )


def is_trial(trainer: L.Trainer) -> bool:
    """Whether this is a `fast_dev_run`, in which nothing is written."""
    return bool(getattr(trainer, "fast_dev_run", False))


def _class_names(instance: object) -> set[str]:
    return {kind.__name__ for kind in type(instance).__mro__}
