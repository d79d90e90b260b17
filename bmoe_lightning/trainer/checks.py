"""Checks of trainer, strategy and data that the callback runs before training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging
from torch import nn

from bmoe_lightning.curvature.sketch import SketchName, check_linear
from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.experts.fsdp import is_sharded, reshard
from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.fitting import prior_mean_layers
from bmoe_lightning.methods.needs import Available, check_needs
from bmoe_lightning.trainer.checkpoints import check_hyperparameters
from bmoe_lightning.trainer.data_passes import as_list, shards_weights, training_pass, validation_pass
from bmoe_lightning.trainer.loaders import iterates_once
from bmoe_lightning.trainer.sampler_shards import check_order, find_sampler_shard
from bmoe_lightning.utils.distributed import gather_number, together

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


def check_setup(
    trainer: L.Trainer,
    module: L.LightningModule,
    callback: L.Callback,
    curvatures: Iterable[Curvature],
    fit_at: str,
    class_logits: ClassLogits | None,
) -> None:
    """Check what is known of trainer and module before any work is done.

    Args:
        trainer: The trainer.
        module: The module.
        callback: `BayesianMoECallback`, one of the trainer's callbacks.
        curvatures: Curvatures of its methods.
        fit_at: Weights that they are fitted to, `last` or `best`.
        class_logits: The callback's argument.

    Raises:
        ValueError: If the strategy, or a later callback, does not allow a fit.
        TypeError: If there is no function `class_logits`.
    """
    check_strategy(trainer)
    check_sketch(trainer, [curvature.sketch for curvature in curvatures if curvature.collects])
    check_fit_at(trainer, fit_at)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    check_later_callbacks(callbacks[callbacks.index(callback) + 1 :])
    check_callable(module, class_logits)


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


def check_callable(module: L.LightningModule, class_logits: ClassLogits | None) -> None:
    """Check that there is a function or method `class_logits`.

    Args:
        module: The module.
        class_logits: The callback's argument.

    Raises:
        TypeError: If it is not callable, or there is none.
    """
    if class_logits is not None and not callable(class_logits):
        raise TypeError(
            f"class_logits must be a function (module, batch) -> (logits [B, K], labels [B]), got {class_logits!r}; "
            "pass a function, or None for the module's method class_logits(batch)"
        )
    if class_logits is None and not callable(getattr(module, "class_logits", None)):
        texts = callable(getattr(module, "sequence_log_prob", None))
        raise TypeError(
            f"{type(module).__name__} has no method class_logits(batch) -> (logits [B, K], labels [B]), and "
            "BayesianMoECallback got no class_logits argument; define the method, or pass the argument"
            + ("; it has sequence_log_prob: for texts there is BayesianTextCallback" if texts else "")
        )


def check_data(trainer: L.Trainer, methods: Sequence[Method], *, trains: bool = True) -> None:
    """Check that methods can be fitted on the training and validation data.

    Args:
        trainer: Trainer within a fit, with its training loader set up.
        methods: Methods to fit.
        trains: Whether training comes first, which iterates over both data sets.

    Raises:
        RuntimeError: If a loader does not support a pass outside of the loops; see `training_pass`.
        NeedsError: If there are no held-out inputs.
        ValueError: If there are several ranks, and it is unknown which examples their samplers repeat; or a second pass
            over data is needed that can be iterated over only once.
    """
    collected = {c.digest: c for method in methods for c in method.curvatures if c.collects}
    for curvature in collected.values():
        training_pass(trainer, "Curvature", curvature.max_batches)
    if len(collected) + trains > 1 and iterates_once(trainer.train_dataloader):
        raise ValueError(
            "the training data can be iterated over only once, and the curvature needs "
            f"{'another pass after training' if trains else 'several passes'}; use a data set whose __iter__ starts "
            "again, or call fit_posterior with other data"
        )
    if any(method.needs.calibration for method in methods):
        calibration = validation_pass(trainer, "Calibration")
        if calibration is None:
            check_needs(methods, Available(calibration_inputs=0, runs=True))
        elif trains and iterates_once(as_list(trainer.val_dataloaders)[0]):
            raise ValueError(
                "the validation data can be iterated over only once, and calibration needs another pass after "
                "training; use a data set whose __iter__ starts again"
            )


def check_runs(trainer: L.Trainer, methods: Sequence[Method], module: L.LightningModule, folder: Path | None) -> None:
    """Check that methods can be fitted after the run; see `Method.check_run`. A collective.

    Args:
        trainer: The trainer.
        methods: Methods to fit.
        module: The module.
        folder: Folder to which the fit will be written, or None.

    Raises:
        ValueError: If a method cannot be fitted on this rank.
        RuntimeError: If a method cannot be fitted on another rank.
    """
    trained = list(module.parameters()) if unfreezes(trainer) else optimised(trainer, module)

    def check() -> None:
        for method in methods:
            method.check_run(module, folder, ranks_per_node=trainer.num_devices, trained=trained)

    together(check, distributed=trainer.world_size > 1)


def check_optimised(trainer: L.Trainer, module: L.LightningModule, methods: Sequence[Method]) -> None:
    """Check that training moves the layers whose distance from the prior mean methods use.

    Args:
        trainer: Trainer within a fit, with its optimizers set up.
        module: The module.
        methods: Methods to fit.

    Raises:
        ValueError: If no optimizer has a parameter of a layer; the message names the layer.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    optimised = {id(p) for group in groups for p in group["params"] if p.requires_grad}
    if not groups or unfreezes(trainer):
        return
    for layer in prior_mean_layers(methods, module):
        if not any(id(p) in optimised for p in module.get_submodule(layer.module_name).parameters()):
            needing = ", ".join(method.name for method in methods if method.needs.prior_mean)
            raise ValueError(
                f"no optimizer has a parameter of {layer.name!r}, and how far training moves its weights is what "
                f"{needing} needs; train it, use prior_mean='zero', or skip the layer"
            )


def unfreezes(trainer: L.Trainer) -> bool:
    """Whether a callback of the trainer may unfreeze parameters during training, so that any of them may be trained."""
    return any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def optimised(trainer: L.Trainer, module: L.LightningModule) -> list[nn.Parameter] | None:
    """The parameters of a module that the trainer's optimizers have; None if there are none, as without optimizers."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    chosen = {id(parameter) for group in groups for parameter in group["params"]}
    return [p for p in module.parameters() if p.requires_grad and id(p) in chosen] or None


def check_training(
    trainer: L.Trainer,
    module: L.LightningModule,
    methods: Sequence[Method],
    fit_at: str,
    folder: Path | None,
    num_snapshots: int,
) -> None:
    """Check before training that the methods can be fitted after it.

    Args:
        trainer: Trainer within a fit, with its training loader set up.
        module: The module.
        methods: Methods to fit.
        fit_at: Weights that they are fitted to, `last` or `best`.
        folder: Output folder, or None.
        num_snapshots: Number of snapshots of the run that is resumed.

    Raises:
        ValueError: If data, epochs, a method's own requirements or the checkpoint callback do not allow it.
        RuntimeError: If a loader does not support a pass outside of the loops, or no best checkpoint could be loaded.
    """
    check_data(trainer, methods)
    check_optimised(trainer, module, methods)
    epochs = trainer.max_epochs
    if epochs is not None and epochs >= 0 and not is_trial(trainer):
        check_needs(methods, Available(snapshots=num_snapshots + epochs - trainer.current_epoch))
    check_runs(trainer, methods, module, folder)
    if fit_at == "best" and getattr(trainer.checkpoint_callback, "monitor", None) is None:
        raise ValueError(
            "fit_at='best' needs a ModelCheckpoint with monitor=..., and the trainer has none; add one, or use "
            "fit_at='last'"
        )
    if fit_at == "best":
        check_hyperparameters(trainer, module)


def check_loaders(trainer: L.Trainer, loaders: Sequence[Any], methods: Sequence[Method] = ()) -> None:
    """Check that methods can be evaluated on some loaders.

    Raises:
        ValueError: If several ranks would count examples twice (the message names the loader's sampler), or an ensemble
            needs another pass over data that can be iterated over only once.
    """
    several = [method.name for method in methods if method.is_ensemble]
    for loader in loaders:
        shard = find_sampler_shard(trainer, loader, math.inf)
        if shard is not None:
            check_order(shard)
        if several and iterates_once(loader):
            raise ValueError(
                f"{', '.join(several)} run one pass over the data per member, and these data can be iterated over only "
                "once; use a data set whose __iter__ starts again, or remove these methods"
            )


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
