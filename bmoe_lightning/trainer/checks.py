"""What the callback refuses before time is spent on training."""

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
    """Refuse strategies under which a plain forward and backward pass of the module does not work.

    Raises:
        ValueError: Naming the strategy.
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
        strategy: Any = trainer.strategy
        check_tensor_parallel(strategy.device_mesh)
    elif trainer.world_size > 1 and ("DDPStrategy" not in names or "XLAStrategy" in names):
        raise ValueError(
            "BayesianMoECallback runs on several processes with DDP and with ModelParallelStrategy (FSDP2), and the "
            f"trainer has {trainer.world_size} with {type(trainer.strategy).__name__}. Use one of these, or train with "
            "all of them, load the checkpoint in one process and call fit_posterior"
        )


def check_tensor_parallel(mesh: DeviceMesh) -> None:
    """Refuse tensor parallelism, under which no rank sees a whole activation.

    Args:
        mesh: The device mesh of `ModelParallelStrategy`.

    Raises:
        ValueError: Naming the size of the tensor-parallel group.
    """
    size = mesh["tensor_parallel"].size()
    if size > 1:
        raise ValueError(
            f"ModelParallelStrategy has a tensor-parallel group of {size} processes (by default all of a node's), and "
            "bmoe_lightning supports sharded weights (FSDP2) alone. Give ModelParallelStrategy(data_parallel_size="
            f"{mesh.size()}, tensor_parallel_size=1), and apply fully_shard in configure_model"
        )


def check_shards(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Refuse to train parameters that are not sharded, whose gradients no strategy averages.

    Raises:
        ValueError: Naming a parameter.
    """
    if trainer.world_size == 1 or not shards_weights(trainer):
        return
    reshard(module)
    unsharded = [name for name, p in module.named_parameters() if p.requires_grad and not is_sharded(p)]
    if unsharded:
        raise ValueError(
            f"{len(unsharded)} trained parameters are not sharded, {unsharded[0]!r} for one, and ModelParallelStrategy "
            "averages no gradients of such: processes would end with different models. Call fully_shard on the whole "
            "model in configure_model (on its blocks first), or freeze them"
        )


def check_prediction(trainer: L.Trainer, loaders: Sequence[Any]) -> None:
    """Refuse to predict with sharded weights where ranks have different numbers of examples. A collective.

    Lightning pads no loader in a prediction, so a rank may run out of batches while others wait in an all-gather.

    Raises:
        ValueError: Naming the numbers of examples, or a loader without a length.
    """
    for loader in loaders if shards_weights(trainer) else ():
        sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
        # -1 rather than an error at once: the other ranks are about to compare too.
        numbers = gather_number(len(sampler) if isinstance(sampler, Sized) else -1)
        if min(numbers) < 0 or len(set(numbers)) > 1:
            found = ", ".join("unknown" if number < 0 else str(number) for number in numbers)
            raise ValueError(
                "processes all-gather sharded weights in lockstep, so each must predict equally many examples, and "
                f"they have {found}. Predict a number of examples that the number of processes divides, from a "
                "DataLoader over a data set with a length; or use trainer.test, or one process"
            )


def with_enough_snapshots(methods: Sequence[Method], num_snapshots: int) -> list[Method]:
    """The methods that the snapshots of a training that has ended allow to be fitted.

    Args:
        methods: Methods of the run.
        num_snapshots: Snapshots that there are, fewer than expected if training stopped early.

    Warns:
        UserWarning: Naming the methods that are left out.
    """
    short = [method.name for method in methods if method.needs.snapshots > num_snapshots]
    if short:
        warnings.warn(
            f"training ended with {num_snapshots} snapshots, too few for {', '.join(short)}: the other methods are "
            "fitted; leave these out, or train for more epochs",
            stacklevel=2,
        )
    return [method for method in methods if method.name not in short]


def check_sketch(trainer: L.Trainer, sketches: Iterable[SketchName]) -> None:
    """Refuse sketches of the curvature that several ranks cannot sum.

    Args:
        trainer: The trainer.
        sketches: The sketches that will be used.

    Raises:
        ValueError: Naming the sketch.
    """
    if trainer.world_size > 1:
        for sketch in sketches:
            check_linear(sketch)


def check_data(trainer: L.Trainer, methods: Sequence[Method]) -> None:
    """Refuse training and validation data on which methods could not be fitted in the end.

    Args:
        trainer: A trainer that fits, its training loader set up.
        methods: Methods that are going to be fitted.

    Raises:
        RuntimeError: If the loaders are not what a pass outside of the loops needs; see `training_pass`.
        NeedsError: If there are too few held-out inputs, or none.
        ValueError: If the trainer has several processes and their examples cannot be told apart.
    """
    for curvature in (curvature for method in methods for curvature in method.curvatures if curvature.collects):
        training_pass(trainer, "Curvature", curvature.max_batches)
    if any(method.needs.calibration for method in methods):
        calibration = validation_pass(trainer, "Calibration")
        count = 0 if calibration is None else calibration.num_examples
        check_needs(methods, Available(calibration_inputs=count, runs=True))


def check_loaders(trainer: L.Trainer, loaders: Sequence[Any]) -> None:
    """Refuse evaluation loaders of which several ranks would count examples twice.

    Raises:
        ValueError: Naming the loader's samplers.
    """
    for loader in loaders:
        shard = find_sampler_shard(trainer, loader, math.inf)
        if shard is not None:
            check_order(shard)


def check_later_callbacks(later: Sequence[L.Callback]) -> None:
    """Refuse callbacks that change the weights at the end of training, after the posterior was fitted.

    Args:
        later: The callbacks behind `BayesianMoECallback` in the trainer's list.

    Raises:
        ValueError: Naming the callback.
    """
    for other in later:
        changes_weights = isinstance(other, (StochasticWeightAveraging, ModelPruning))
        # By name: Lightning before 2.6 has no such class.
        if changes_weights or "WeightAveraging" in _class_names(other):
            raise ValueError(
                f"{type(other).__name__} changes the weights when training ends, so it must come before "
                "BayesianMoECallback in the trainer's callbacks"
            )


def check_fit_at(trainer: L.Trainer, fit_at: str) -> None:
    """Refuse to fit at the best weights of a trainer that shards them.

    Raises:
        ValueError: If a checkpoint of unsharded weights would have to be loaded.
    """
    if fit_at == "best" and shards_weights(trainer):
        raise ValueError(
            "fit_at='best' reads a checkpoint of unsharded weights, and ModelParallelStrategy shards them; fit at the "
            "last ones, or load the best ones into one process and call fit_posterior"
        )


def is_trial(trainer: L.Trainer) -> bool:
    """Whether this is a `fast_dev_run`: everything runs, nothing is written."""
    return bool(getattr(trainer, "fast_dev_run", False))


def _class_names(instance: object) -> set[str]:
    return {kind.__name__ for kind in type(instance).__mro__}
