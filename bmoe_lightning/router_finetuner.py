"""A LightningModule that trains Bayesian routers beside a causal language model, alone or with its experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.experts.discovery import find_expert_layers
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.weights import expert_parameters
from bmoe_lightning.methods.base import check_choice
from bmoe_lightning.methods.evaluation import average_log_probs
from bmoe_lightning.models.loading import DtypeName
from bmoe_lightning.optim import HalfPrecisionUpdates
from bmoe_lightning.routers.attached import BayesianRouters, checked_layers
from bmoe_lightning.routers.draws import PositionNoise
from bmoe_lightning.routers.kinds import RouterOptions, check_draws_experts
from bmoe_lightning.routers.prediction import mean_routers, sampled_routes
from bmoe_lightning.trainer.learning_rate import Schedule
from bmoe_lightning.trainer.router_checkpoints import ROUTERS_KEY, read_routers_entry, routers_entry
from bmoe_lightning.trainer.router_steps import PriorUnit, RouterPrior, RouterSteps

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

RouterTrainedPart = Literal["routers", "routers_and_experts"]

_BASELINE_DECAY = 0.9


class RouterFinetuner(Finetuner):
    """Trains Bayesian routers beside a mixture-of-experts language model, alone or jointly with its experts.

    The routers' logits, or choices, are random (https://arxiv.org/abs/2509.23830, https://arxiv.org/abs/2603.09453):
    in each training step one sample per token is drawn, and the loss is the cross entropy plus `beta` times a
    penalty, which holds the distributions near their prior. All weights of the model but those of its experts are
    frozen, its own routers among them. Trained alone beside a model that has memorised its training data, the noise
    shrinks; jointly with the experts it regularises them.

    The Bayesian routers stand beside the model and not in it. `class_logits` is the model without them, with trained
    experts, and so are methods that do not use them. Validation, test and `trainer.predict` average the probabilities
    over `num_samples` sampled routes, the same ones for each batch.

    Logged after each epoch, as means over the routers: `router/kl`, the divergence from the prior in nats per token;
    `router/scale_ratio`, the size of the noise in units of the prior's; `router/changed`, the share of tokens whose
    experts change; `router/gate_temperature` and `router/gate_entropy` of kind `temperature`. A warning says when the
    noise has collapsed.

    Batches, checkpoints (with the Bayesian routers, and the experts if they are trained), dtypes and
    `half_precision_updates` are as described in `ExpertFinetuner`. Weights of the Bayesian routers are in float32 at
    least.

    Args:
        model: Causal language model with experts, or its local folder or hub id; see `ExpertFinetuner`.
        answer_token_ids: Token id of each of the K choices; by default `answer_token_ids` of the trainer's datamodule,
            which is None where batches have the tokens of their choices.
        kind: Kind of the Bayesian routers: `mean_field` (independent Gaussian logits), `full_covariance` (correlated
            ones) or `temperature` (experts drawn with a temperature of each token).
        train: Trained part: the Bayesian `routers`, or `routers_and_experts`.
        layers: Indices of the routers that are random, by their order; all of them if there are none.
        rank: Rank of the covariances of `full_covariance`; None for the full form, which is for 128 experts at most.
        hidden: Width of the hidden layers of the Bayesian routers; by default a quarter of the model's.
        beta: What multiplies the penalty: the sum over routers of the mean over real tokens, in nats. Padding and the
            size of batches and data do not change it. With accumulated gradients or several processes it is the mean
            over batches, as the loss is.
        prior_scale: Standard deviation of the noise of each logit under the prior, in units of `prior_unit`. Not of
            kind `temperature`.
        prior_unit: `gap`, the median gap between the K-th and the next largest logit of each router, measured on the
            first training batch of all processes and logged; or `one`, as in the papers, which is random routing where
            logits are small.
        score_function: Whether drawn experts get the gradient of their log-probability times the loss, which is
            unbiased for the cross entropy and has much variance; kind `temperature` only. That the penalty of later
            routers depends on earlier choices is left out.
        num_samples: Number of sampled routes in validation, test and prediction; 0 runs the routers' means.
        seed: Seed of the first weights and of the samples.
        learning_rate: Peak learning rate of the experts, with AdamW (https://arxiv.org/abs/1711.05101).
        router_learning_rate: Peak learning rate of the Bayesian routers.
        weight_decay: Weight decay of AdamW.
        betas: Betas of AdamW.
        schedule: Learning-rate schedule: `linear` or `cosine` (both decay to zero at the end of training), or
            `constant`.
        warmup_fraction: Fraction of the steps with linear warm-up, in [0, 1).
        dtype: Dtype of the weights if `model` is a string; `auto` is the dtype in which they were saved.
        half_precision_updates: How trained experts in half precision are updated; see `ExpertFinetuner`.

    Attributes:
        routers: The Bayesian routers; None before the model is loaded.

    Raises:
        TypeError: If `model` is of another type.
        ValueError: If an argument is unknown or out of range, two choices share a token, or the model has no routers
            that can be of the kind.
        ImportError: If `half_precision_updates` needs torchao and it is not installed.
    """

    decisive = ("train", "kind", "layers", "rank", "hidden")

    def __init__(
        self,
        model: PreTrainedModel | str,
        answer_token_ids: Sequence[int] | Tensor | None = None,
        kind: str = "mean_field",
        train: RouterTrainedPart = "routers_and_experts",
        layers: Sequence[int] = (),
        rank: int | None = None,
        hidden: int | None = None,
        beta: float = RouterPrior.beta,
        prior_scale: float = RouterPrior.scale,
        prior_unit: PriorUnit = RouterPrior.unit,
        score_function: bool = False,
        num_samples: int = 4,
        seed: int = 0,
        learning_rate: float = 5e-5,
        router_learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: Schedule = "linear",
        warmup_fraction: float = 0.0,
        dtype: DtypeName = "auto",
        half_precision_updates: HalfPrecisionUpdates = "master_weights",
    ) -> None:
        check_choice("train", train, get_args(RouterTrainedPart))
        self.options = RouterOptions(kind, rank, hidden, seed)
        self.prior = RouterPrior(prior_scale, prior_unit, beta)
        self.layers = layers = checked_layers(layers)
        _check_numbers(num_samples, seed, router_learning_rate)
        if score_function:
            check_draws_experts(kind)
        super().__init__(
            model,
            answer_token_ids,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            betas=betas,
            schedule=schedule,
            warmup_fraction=warmup_fraction,
            dropout=("dropout", 0.0),
            dtype=dtype,
            half_precision_updates=half_precision_updates,
        )
        # Plain values: hyperparameters go into checkpoints and to loggers.
        answer_token_ids, betas = self._plain_answers(), self.betas
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        self.train_part: RouterTrainedPart = train
        self.router_learning_rate = router_learning_rate
        self.score_function = score_function
        self.num_samples = num_samples
        self.routers: BayesianRouters | None = None
        self._seed = seed
        self._steps: RouterSteps | None = None
        self._baseline: Tensor | None = None
        self._noise = PositionNoise(seed)

    def _check_model(self, model: PreTrainedModel) -> None:
        BayesianRouters(model, self.options, self.layers)

    def _load(self, mesh: DeviceMesh | None) -> None:
        super()._load(mesh)
        if mesh is not None:
            self._made().shard(mesh)

    def _prepare(self, model: PreTrainedModel) -> Sequence[ExpertLayer]:
        if self.routers is None:
            self.routers = BayesianRouters(model, self.options, self.layers)
        return find_expert_layers(model)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, as in `self.named_parameters()`."""
        return {**self._trained_experts(), **self._router_parameters()}

    def stored_names(self) -> set[str]:
        """Names of the trained parameters, and of the scales of the priors."""
        return {*self._trained_experts(), *(f"routers.{name}" for name in self._made().state_dict())}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained experts, if any, and the Bayesian routers with their own learning rate."""
        experts, routers = list(self._trained_experts().values()), list(self._router_parameters().values())
        groups: list[dict[str, Any]] = [{"params": experts}] if experts else []
        return [*groups, {"params": routers, "lr": self.router_learning_rate}]

    def on_train_start(self) -> None:
        """Prepare to run the Bayesian routers in training steps, and watch whether the weights move."""
        super().on_train_start()
        self._baseline = None
        self._steps = RouterSteps(self._ready(), self._made(), self.prior, self._seed)
        self._undo.callback(self._steps.close)

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Probe the routers and scale their priors on the first batch, outside of autocast, which caches weights."""
        if self._steps is not None:
            self._steps.prepare(self.trainer, lambda: self.class_logits(batch)[0])

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy along sampled routes plus `beta` times the penalty; logs `train/loss`, the cross entropy.

        Raises:
            RuntimeError: If no training runs, or activations are recomputed by reentrant gradient checkpointing.
            ValueError: If the batch has no labels.
        """
        if self._steps is None:
            raise RuntimeError("the Bayesian routers run in training alone; call trainer.fit")
        training = self._steps.begin(self.trainer.fit_loop.total_batch_idx)
        loss = super().training_step(batch, batch_idx)
        objective = loss + self.prior.beta * training.penalty().to(loss.device)
        probability = training.log_probability() if self.score_function else None
        if probability is not None:
            value = loss.detach()
            before = value if self._baseline is None else self._baseline
            objective = objective + (value - before) * probability.sum().to(loss.device)
            self._baseline = _BASELINE_DECAY * before + (1 - _BASELINE_DECAY) * value
        return objective

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the step: the model is itself in validation."""
        if self._steps is not None:
            self._steps.end()

    def on_train_epoch_end(self) -> None:
        """Log what the Bayesian routers report."""
        if self._steps is not None:
            means = {f"router/{name}": value for name, value in self._steps.epoch_means().items()}
            self.log_dict(means, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what was trained, and hashes of the routers beside which it was."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[ROUTERS_KEY] = routers_entry(self._ready(), self._made())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint contains what this module trains, and was trained beside the same routers.

        Raises:
            RuntimeError: If tensors are missing or unexpected.
            ValueError: If the weights of the model's routers are others.
        """
        super().on_load_checkpoint(checkpoint)
        read_routers_entry(self._ready(), self._made(), checkpoint)

    def release(self) -> None:
        """Take the Bayesian routers out of the model. Idempotent."""
        super().release()
        self._steps = None

    def _answered(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        model, routers = self._ready(), self._made()
        if any(net.draws_choice for net in routers.nets):
            routers.probe(model, lambda: self.class_logits(batch)[0])
        if not self.num_samples or all(net.is_still for net in routers.nets):
            with mean_routers(model, routers.nets):
                return self.class_logits(batch)
        found, labels = [], None
        for sample in range(self.num_samples):
            with sampled_routes(model, routers.nets, [sample], self._noise):
                logits, labels = self.class_logits(batch)
            found.append(logits.log_softmax(-1))
        return average_log_probs(torch.stack(found)), labels

    def _has_own_step(self, stage: Literal["val", "test"]) -> bool:
        """Always: the callback's logits are those of the model without Bayesian routers."""
        return False

    def _trained_experts(self) -> dict[str, nn.Parameter]:
        model, found = self._ready(), dict[str, nn.Parameter]()
        if self.train_part == "routers_and_experts":
            for layer in find_expert_layers(model):
                found |= expert_parameters(model, layer)
        return {f"model.{name}": parameter for name, parameter in found.items()}

    def _router_parameters(self) -> dict[str, nn.Parameter]:
        return {f"routers.{name}": parameter for name, parameter in self._made().named_parameters()}

    def _made(self) -> BayesianRouters:
        self._ready()
        if self.routers is None:
            raise RuntimeError("the Bayesian routers are not made yet; call configure_model() first")
        return self.routers


def _check_numbers(num_samples: int, seed: int, router_learning_rate: float) -> None:
    checks = (
        ("num_samples", num_samples, num_samples >= 0, "0 or more"),
        ("seed", seed, seed >= 0, "0 or more"),
        ("router_learning_rate", router_learning_rate, 0 < router_learning_rate < float("inf"), "positive"),
    )
    for name, value, holds, valid in checks:
        if not holds:
            raise ValueError(f"{name} must be {valid}, got {value}")
