"""A LightningModule that fine-tunes the experts of a causal language model on multiple-choice questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.experts.discovery import find_expert_layers
from bmoe_lightning.experts.dropout import expert_dropout as dropout_in_experts
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.weights import down_proj_parameters, expert_parameters
from bmoe_lightning.methods.base import check_choice
from bmoe_lightning.models.loading import DtypeName
from bmoe_lightning.optim import HalfPrecisionUpdates
from bmoe_lightning.trainer.learning_rate import Schedule

TrainedPart = Literal["down_proj", "experts"]


class ExpertFinetuner(Finetuner):
    """Fine-tunes the experts of a mixture-of-experts causal language model; everything else stays frozen.

    The defaults are those of the paper (https://arxiv.org/abs/2511.08968, Table 8). Its gradient clipping is the
    trainer's: `Trainer(gradient_clip_val=1.0)`. Weights in bfloat16 or float16, whether saved so or because of the
    trainer's `precision`, have values further apart than most updates; `half_precision_updates` says what becomes of
    these.

    A batch is a mapping with `input_ids` and `attention_mask` `[B, T]`, padded on either side, and optionally
    `choice_mask [B, K]`, `label [B]` and `index [B]`; see `MultipleChoiceDataModule`. A batch with the tokens of its
    choices (`choice_index`, see `bmoe_lightning.data.cloze.ClozeBatch`) is answered by their texts instead of letters.

    Checkpoints contain only the trained tensors; sharded checkpoints, of which each rank writes its shards, contain
    all. `load_from_checkpoint(path)` loads the frozen weights from `model`; if that was an object, pass it again:
    `load_from_checkpoint(path, model=model)`.

    Args:
        model: Causal language model with experts, or its local folder or hub id, which is loaded when the trainer (or
            `load_from_checkpoint`) calls `configure_model`. Code from the hub is never run.
        answer_token_ids: Token id of each of the K choices; by default `answer_token_ids` of the trainer's datamodule,
            which is None where batches have the tokens of their choices.
        train: Trained part: `experts` (all weights of the experts) or `down_proj` (only their second linear layers).
            Routers and shared experts are always frozen.
        learning_rate: Peak learning rate of AdamW (https://arxiv.org/abs/1711.05101).
        weight_decay: Weight decay of AdamW.
        betas: Betas of AdamW.
        schedule: Learning-rate schedule: `linear` or `cosine` (both decay to zero at the end of training), or
            `constant`.
        warmup_fraction: Fraction of the steps with linear warm-up, in [0, 1).
        expert_dropout: Probability that an activation is dropped before the `down_proj` of its expert, in training
            only. 0 leaves the model's experts implementation unchanged.
        dtype: Dtype of the weights if `model` is a string; `auto` is the dtype in which they were saved.
        half_precision_updates: How trained weights in half precision are updated (`bmoe_lightning.optim.make_adamw`).
            `master_weights` accumulates updates in a float32 copy, `stochastic_rounding` rounds them to bfloat16 up or
            down at random (needs the extra `torchao`), `nearest` rounds them to the nearest value, which loses most of
            them. Weights in float32 are updated as they are.

    Raises:
        TypeError: If `model` is of another type.
        ValueError: If an argument is unknown or out of range, two choices share a token, or the model has no experts.
        ImportError: If `half_precision_updates` needs torchao and it is not installed.
    """

    decisive = ("train",)

    def __init__(
        self,
        model: PreTrainedModel | str,
        answer_token_ids: Sequence[int] | Tensor | None = None,
        train: TrainedPart = "experts",
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: Schedule = "linear",
        warmup_fraction: float = 0.0,
        expert_dropout: float = 0.1,
        dtype: DtypeName = "auto",
        half_precision_updates: HalfPrecisionUpdates = "master_weights",
    ) -> None:
        check_choice("train", train, get_args(TrainedPart))
        super().__init__(
            model,
            answer_token_ids,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            betas=betas,
            schedule=schedule,
            warmup_fraction=warmup_fraction,
            dropout=("expert_dropout", expert_dropout),
            dtype=dtype,
            half_precision_updates=half_precision_updates,
        )
        # Plain values: hyperparameters go into checkpoints and to loggers.
        answer_token_ids, betas = self._plain_answers(), self.betas
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        self.train_part: TrainedPart = train
        self.expert_dropout = expert_dropout

    def _check_model(self, model: PreTrainedModel) -> None:
        find_expert_layers(model)

    def _prepare(self, model: PreTrainedModel) -> Sequence[ExpertLayer]:
        return find_expert_layers(model)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, as in `self.named_parameters()`."""
        model = self._ready()
        trained: dict[str, nn.Parameter] = {}
        for layer in find_expert_layers(model):
            of_layer = down_proj_parameters if self.train_part == "down_proj" else expert_parameters
            trained |= of_layer(model, layer)
        return {f"model.{name}": parameter for name, parameter in trained.items()}

    def on_train_start(self) -> None:
        """Add expert dropout, which is active in training mode, and watch whether the weights move."""
        super().on_train_start()
        if self.expert_dropout > 0:
            model = self._ready()
            self._undo.enter_context(dropout_in_experts(model, find_expert_layers(model), self.expert_dropout))
