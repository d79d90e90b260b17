"""A Lightning callback that trains Bayesian routers beside the model of a user's own module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial, wraps
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.experts.wrappers.compiled import is_compiled
from bmoe_lightning.router_finetuner import RouterFinetuner
from bmoe_lightning.routers.attached import BayesianRouters, attached_routers, checked_layers
from bmoe_lightning.routers.discovery import find_routers
from bmoe_lightning.routers.kinds import RouterOptions
from bmoe_lightning.trainer.checks import check_callable
from bmoe_lightning.trainer.first_batches import no_logging
from bmoe_lightning.trainer.router_checkpoints import ROUTERS_KEY, read_routers_entry, routers_entry, stored_routers
from bmoe_lightning.trainer.router_steps import PriorUnit, RouterPrior, RouterSteps

_NAME = "bayesian_routers"


class RouterTrainingCallback(L.Callback):
    """Trains Bayesian routers beside the model of any LightningModule, in its own training step and optimizer.

    Before the optimizer is made, the module gets a submodule `bayesian_routers`, whose weights are trained with all
    others that `configure_optimizers` takes from `self.parameters()`. Checkpoints have them apart from the state dict,
    which is the user's own, and the callback loads them again; files of weights alone and those of FSDP2 have them in
    the state dict. In `training_step`, which
    stays as it is, the logits or choices of the model's routers are samples, one for each token; the backward pass of
    its loss adds the gradient of `beta` times their penalty, counted once under gradient accumulation and not scaled
    twice by mixed precision. In validation, test and prediction the module is itself, without Bayesian routers.

    What is logged and said is that of `RouterFinetuner`, which explains the kinds and the prior. Works with one device,
    DDP, and FSDP2 (`ModelParallelStrategy`), in which case `configure_model` shards the model; gradient checkpointing
    of both kinds; and automatic optimization only, since nothing is known of the scale of losses in a manual one.

    Examples:
        >>> trainer = L.Trainer(callbacks=[RouterTrainingCallback()])    # doctest: +SKIP
        >>> trainer.fit(module, datamodule=data)                         # doctest: +SKIP

    Args:
        kind: Kind of the Bayesian routers: `mean_field`, `full_covariance` or `temperature`.
        layers: Indices of the routers that are random, by their order; all of them if there are none.
        rank: Rank of the covariances of `full_covariance`; None for the full form.
        hidden: Width of the hidden layers of the Bayesian routers; by default a quarter of the model's.
        beta: What multiplies the penalty; see `RouterFinetuner`.
        prior_scale: Standard deviation of the noise of each logit under the prior, in units of `prior_unit`.
        prior_unit: `gap` or `one`; see `RouterFinetuner`.
        class_logits: Function `(module, batch) -> (logits [B, K], labels [B])`, if the module has no such method. It
            runs on the first training batch alone, to examine the routers.
        seed: Seed of the first weights and of the samples.

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    def __init__(
        self,
        kind: str = "mean_field",
        layers: Sequence[int] = (),
        rank: int | None = None,
        hidden: int | None = None,
        beta: float = RouterPrior.beta,
        prior_scale: float = RouterPrior.scale,
        prior_unit: PriorUnit = RouterPrior.unit,
        class_logits: ClassLogits | None = None,
        seed: int = 0,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.options = RouterOptions(kind, rank, hidden, seed)
        self.prior = RouterPrior(prior_scale, prior_unit, beta)
        self.layers = checked_layers(layers)
        self.seed = seed
        self._class_logits = class_logits
        self._steps: RouterSteps | None = None
        self._undo: list[Callable[[], object]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check trainer and module, and put the Bayesian routers beside the model once it is complete."""
        self._restore()
        if isinstance(pl_module, RouterFinetuner):
            raise ValueError(
                "RouterFinetuner trains its Bayesian routers itself, and RouterTrainingCallback would train them a "
                "second time; leave the callback out"
            )
        if stage == "fit":
            _check(trainer, pl_module)
            check_callable(pl_module, self._class_logits)
        if is_overridden("configure_model", pl_module):
            self._replace(pl_module, "configure_model", after=partial(self._attach, pl_module))
        else:
            self._attach(pl_module)
        self._replace(pl_module, "on_load_checkpoint", before=partial(self._insert, pl_module))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the Bayesian routers apart from the state dict of the user's module."""
        routers = attached_routers(pl_module)
        if routers is None:
            return
        entry = routers_entry(pl_module, routers) | self._description(routers)
        # ModelParallelStrategy loads the file itself, before anyone could put them back.
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            state = checkpoint["state_dict"]
            entry["state"] = {name: value for name, value in state.items() if name.startswith(f"{_NAME}.")}
            checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in entry["state"]}
        checkpoint[ROUTERS_KEY] = entry

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check that the Bayesian routers that were loaded were trained beside the same routers.

        Raises:
            ValueError: If the weights of the module's routers are others.
        """
        read_routers_entry(pl_module, _attached(pl_module), checkpoint)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that an optimizer trains the Bayesian routers."""
        self._attach(pl_module)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        trained = {id(parameter) for group in groups for parameter in group["params"] if parameter.requires_grad}
        named = list(_attached(pl_module).named_parameters())
        missing = [name for name, parameter in named if id(parameter) not in trained]
        if missing:
            raise ValueError(
                f"{len(missing)} of the {len(named)} parameters of the Bayesian routers are in no optimizer of "
                f"{type(pl_module).__name__}, '{_NAME}.{missing[0]}' for one; let configure_optimizers take them from "
                f"self.parameters(), or from self.{_NAME}.parameters()"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Have each training step begin with another sample."""
        steps = self._steps = RouterSteps(pl_module, _attached(pl_module), self.prior, self.seed)
        self._undo.append(steps.close)

        def begin(*_: Any, **__: Any) -> None:
            # Here and not when the batch starts: other callbacks run the model then.
            weight = self.prior.beta * _loss_scale(trainer) / trainer.accumulate_grad_batches
            steps.begin(trainer.fit_loop.total_batch_idx, penalty_weight=weight)

        self._replace(pl_module, "training_step", before=begin)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Probe the routers and scale their priors on the first batch, outside of autocast, which caches weights."""

        def run() -> Any:
            with no_logging(pl_module):
                module: Any = pl_module
                given = self._class_logits
                return (module.class_logits(batch) if given is None else given(module, batch))[0]

        if self._steps is not None:
            self._steps.prepare(trainer, run)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step: the model is itself until the next one."""
        if self._steps is not None:
            self._steps.end()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what the Bayesian routers report."""
        if self._steps is not None:
            means = {f"router/{name}": value for name, value in self._steps.epoch_means().items()}
            pl_module.log_dict(means, sync_dist=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the Bayesian routers out of the model; the module keeps them."""
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the module's methods."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the Bayesian routers out of the model, and restore the module's methods."""
        self._restore()

    def _insert(self, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the Bayesian routers of a checkpoint into its state dict, before the module loads it."""
        routers, entry = _attached(module), checkpoint.get(ROUTERS_KEY, {})
        here = self._description(routers)
        then = {name: entry.get(name, value) for name, value in here.items()}
        if here != then:
            raise ValueError(
                f"the checkpoint has Bayesian routers with {then}, and RouterTrainingCallback has {here}; pass it the "
                "options with which they were trained"
            )
        if "state_dict" in checkpoint:
            own = {f"{_NAME}.{name}": value for name, value in routers.state_dict().items()}
            checkpoint["state_dict"] = own | checkpoint["state_dict"] | stored_routers(checkpoint)

    @staticmethod
    def _description(routers: BayesianRouters) -> dict[str, Any]:
        return asdict(routers.options) | {"layers": [net.router.index for net in routers.nets]}

    def _attach(self, module: L.LightningModule, *_: Any) -> None:
        known = attached_routers(module)
        if known is None:
            known = BayesianRouters(module, self.options, self.layers)
            module.add_module(_NAME, known)
        given = [net.router.index for net in known.nets]
        chosen = sorted(self.layers) or [router.index for router in find_routers(module)]
        if known.options != self.options or given != chosen:
            raise ValueError(
                f"{type(module).__name__} has Bayesian routers already, with {known.options} beside the routers "
                f"{given}; pass the same options to RouterTrainingCallback, or another module"
            )
        if module.device_mesh is not None:
            known.shard(module.device_mesh["data_parallel"])

    def _replace(
        self,
        module: L.LightningModule,
        name: str,
        before: Callable[..., None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Call something before or after a method of a module, until it is restored."""
        method, own = getattr(module, name), vars(module).get(name)

        @wraps(method)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(*args, **kwargs)
            output = method(*args, **kwargs)
            if after is not None:
                after()
            return output

        def restore() -> None:
            if own is None:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = own

        vars(module)[name] = replaced
        self._undo.append(restore)

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._steps = None


def _attached(module: L.LightningModule) -> BayesianRouters:
    found = attached_routers(module)
    assert found is not None
    return found


def _loss_scale(trainer: L.Trainer) -> float:
    """What the precision multiplies losses by before the backward pass."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _check(trainer: L.Trainer, module: L.LightningModule) -> None:
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes manually, so that the scale of its losses is unknown, and with it that "
            "of the routers' penalty; set automatic_optimization = True, or add the penalty to the loss as "
            "bmoe_lightning.routers.trained_routers explains"
        )
    if trainer.world_size > 1 and not isinstance(trainer.strategy, (DDPStrategy, ModelParallelStrategy)):
        raise ValueError(
            "RouterTrainingCallback supports several processes with DDP and with ModelParallelStrategy (FSDP2), and "
            f"the trainer has {trainer.world_size} with {type(trainer.strategy).__name__}; use one of these strategies"
        )
    if is_compiled(module):
        raise ValueError(
            f"{type(module).__name__} is compiled, and compiled code skips the hooks by which its routers are made "
            "random; train it without torch.compile"
        )
