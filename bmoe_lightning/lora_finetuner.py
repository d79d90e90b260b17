"""A LightningModule that fine-tunes a causal language model with LoRA on multiple-choice questions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.curvature.spec import LoRALayers
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.weights import down_proj_parameters
from bmoe_lightning.experts.wrappers.peft import is_adapter
from bmoe_lightning.experts.wrappers.quantised import is_linear
from bmoe_lightning.models.loading import DtypeName
from bmoe_lightning.optim import HalfPrecisionUpdates
from bmoe_lightning.trainer.learning_rate import Schedule
from bmoe_lightning.utils.late_import import how_to_install
from bmoe_lightning.utils.messages import first_names
from bmoe_lightning.utils.random_state import forked_random_state


class LoRAFinetuner(Finetuner):
    """Fine-tunes low-rank updates of a causal language model with PEFT (LoRA); everything else stays frozen.

    Each adapted layer computes `W x + (alpha / rank) B A dropout(x)` (Hu et al. 2021,
    https://arxiv.org/abs/2106.09685); A is random and B zero before training. The defaults are those of Bayesian LoRA
    (https://arxiv.org/abs/2308.13111). The model may have experts or none. Its adapters are those of PEFT, in the dtype
    of the adapted weights, and `module.model.save_pretrained(folder)` writes them in PEFT's format.

    Of a head, only the rows of B that belong to answer tokens get gradients; all others stay zero. A head that is tied
    to the embeddings is adapted in its use as the head, and the embeddings are not.

    Batches, checkpoints, dtypes and `half_precision_updates` are as described in `ExpertFinetuner`. The adapters are
    added by `configure_model`, to the given object.

    Args:
        model: Causal language model, or its local folder or hub id; see `ExpertFinetuner`.
        answer_token_ids: Token id of each of the K choices; by default `answer_token_ids` of the trainer's datamodule,
            which is None where batches have the tokens of their choices.
        rank: Rank r of the updates.
        alpha: Scale of the updates, which are multiplied by `alpha / rank`.
        dropout: Probability that an input of A is dropped, in training only.
        target_modules: Names of the adapted linear layers, as the last part of their qualified names or more of it.
        seed: Seed of the initial A.
        learning_rate: Peak learning rate of AdamW (https://arxiv.org/abs/1711.05101).
        weight_decay: Weight decay of AdamW.
        betas: Betas of AdamW.
        schedule: Learning-rate schedule: `linear` or `cosine` (both decay to zero at the end of training), or
            `constant`.
        warmup_fraction: Fraction of the steps with linear warm-up, in [0, 1).
        dtype: Dtype of the weights if `model` is a string; `auto` is the dtype in which they were saved.
        half_precision_updates: How trained weights in half precision are updated; see `ExpertFinetuner`.

    Raises:
        TypeError: If `model` is of another type, or `target_modules` is a single string.
        ValueError: If an argument is unknown or out of range, two choices share a token, the model has no linear layer
            of a name in `target_modules`, or it has adapters already.
        ImportError: If PEFT is not installed, or `half_precision_updates` needs torchao and it is not installed.
    """

    decisive = ("rank", "alpha", "target_modules")

    def __init__(
        self,
        model: PreTrainedModel | str,
        answer_token_ids: Sequence[int] | Tensor | None = None,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.1,
        target_modules: Sequence[str] = ("q_proj", "v_proj", "lm_head"),
        seed: int = 0,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: Schedule = "linear",
        warmup_fraction: float = 0.0,
        dtype: DtypeName = "auto",
        half_precision_updates: HalfPrecisionUpdates = "master_weights",
    ) -> None:
        _check_peft()
        self.target_modules = target_modules = _checked_targets(target_modules)
        _check_numbers(rank, alpha)
        super().__init__(
            model,
            answer_token_ids,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            betas=betas,
            schedule=schedule,
            warmup_fraction=warmup_fraction,
            dropout=("dropout", dropout),
            dtype=dtype,
            half_precision_updates=half_precision_updates,
        )
        # Plain values: hyperparameters go into checkpoints and to loggers.
        answer_token_ids, betas = self._plain_answers(), self.betas
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model"])
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.seed = seed
        self._adapted = False

    def _check_model(self, model: PreTrainedModel) -> None:
        adapters = [name for name, module in model.named_modules() if is_adapter(module)]
        if adapters:
            raise ValueError(
                f"{type(model).__name__} has {len(adapters)} layers with adapters of PEFT already, {adapters[0]!r} for "
                "one; pass a model without adapters"
            )
        linears = [name for name, module in model.named_modules() if is_linear(module)]
        missing = [target for target in self.target_modules if not any(_is_named(name, target) for name in linears)]
        if missing:
            found = dict.fromkeys(name.rpartition(".")[2] for name in linears)
            raise ValueError(
                f"{type(model).__name__} has no linear layer called {first_names(missing)}; its linear layers are "
                f"called {first_names(found, len(found))}. Name some of them in target_modules."
            )

    def _prepare(self, model: PreTrainedModel) -> Sequence[ExpertLayer]:
        if not self._adapted:
            self._add_adapters(model)
            self._adapted = True
        return LoRALayers().find(model)

    def _add_adapters(self, model: Any) -> None:
        from peft import LoraConfig

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # a factor, though annotated as an integer
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules),
        )
        training = model.training
        with forked_random_state(), warnings.catch_warnings():
            # Adapters that are not merged leave embeddings alone that are tied to an adapted head.
            warnings.filterwarnings("ignore", "Model (has|with) `tie_word_embeddings=True`")
            model.add_adapter(config)
        model.train(training)
        # PEFT's initial values, but from a seed, and the same on any device and in any dtype.
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad(), torch.device("cpu"):
            for layer in LoRALayers("A").find(model):
                (weight,) = down_proj_parameters(model, layer).values()
                initial = torch.empty(weight.shape, dtype=torch.float32)
                weight.copy_(nn.init.kaiming_uniform_(initial, a=math.sqrt(5), generator=generator))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The matrices A and B by name, as in `self.named_parameters()`."""
        model = self._ready()
        layers = LoRALayers().find(model) if self._adapted else []
        return {f"model.{name}": p for layer in layers for name, p in down_proj_parameters(model, layer).items()}


def _check_peft() -> None:
    if find_spec("peft") is None:
        raise ImportError(
            f"LoRAFinetuner needs PEFT, which is not installed; {how_to_install('lora')}, or fine-tune experts with "
            "ExpertFinetuner"
        )


def _checked_targets(targets: Sequence[str]) -> tuple[str, ...]:
    if isinstance(targets, str):
        raise TypeError(f"target_modules must be a list of names, got the single string {targets!r}; put it in a list")
    names = tuple(dict.fromkeys(targets))
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"target_modules must name at least one linear layer, got {targets!r}")
    return names


def _check_numbers(rank: int, alpha: float) -> None:
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive, got {alpha}")


def _is_named(name: str, target: str) -> bool:
    """Whether PEFT adapts a module for a target."""
    return name == target or name.endswith(f".{target}")
