"""What the LightningModules that fine-tune a causal language model on multiple-choice questions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import PreTrainedModel

from bmoe_lightning.experts.fsdp import is_sharded, shard_blocks
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.methods.base import check_choice
from bmoe_lightning.models.answer_logits import answer_logits, checked_answer_ids
from bmoe_lightning.models.buffers import unrounded_buffers
from bmoe_lightning.models.choice_logits import choice_logits, has_choice_tokens
from bmoe_lightning.models.loading import DtypeName, load_causal_model
from bmoe_lightning.optim import HalfPrecisionUpdates, check_half_precision_updates, make_adamw
from bmoe_lightning.trainer.checks import check_tensor_parallel
from bmoe_lightning.trainer.learning_rate import Schedule, check_numbers, make_scheduler
from bmoe_lightning.trainer.moved_weights import watch_moved_weights
from bmoe_lightning.trainer.shared_logits import SharedLogits
from bmoe_lightning.utils.distributed import sequential_per_node
from bmoe_lightning.utils.messages import first_names

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_ANSWERS_KEY = "answer_token_ids"


class Finetuner(LightningModule):
    """What the fine-tunings of a causal language model on multiple-choice questions share.

    A subclass says what is trained (`_prepare`, `trained_parameters`); see `ExpertFinetuner` for the arguments. It
    calls `save_hyperparameters` itself.

    Attributes:
        decisive: Arguments of the subclass that a checkpoint must share with the module that loads it.
        shared_logits: Logits of a test or validation batch that `BayesianMoECallback` predicts anyway.
    """

    decisive: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: PreTrainedModel | str,
        answer_token_ids: Sequence[int] | Tensor | None,
        *,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        schedule: Schedule,
        warmup_fraction: float,
        dropout: tuple[str, float],
        dtype: DtypeName,
        half_precision_updates: HalfPrecisionUpdates,
    ) -> None:
        super().__init__()
        if not isinstance(model, (PreTrainedModel, str)):
            raise TypeError(f"model is a {type(model).__name__}; pass a transformers model, or its folder or hub id")
        check_choice("schedule", schedule, get_args(Schedule))
        check_choice("dtype", dtype, get_args(DtypeName))
        check_half_precision_updates(half_precision_updates)
        check_numbers(learning_rate, weight_decay, betas, warmup_fraction, dropout)
        # A checkpoint lacks frozen weights; `on_load_checkpoint` checks that it has the trained ones.
        self.strict_loading = False
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = (float(betas[0]), float(betas[1]))
        self.schedule: Schedule = schedule
        self.warmup_fraction = warmup_fraction
        self.dtype_name: DtypeName = dtype
        self.half_precision_updates: HalfPrecisionUpdates = half_precision_updates
        self._source = model if isinstance(model, str) else None
        self._undo = ExitStack()
        self.shared_logits = SharedLogits()
        self._answer_ids: Tensor | None
        self.register_buffer("_answer_ids", None, persistent=False)
        self._answers_are_given = answer_token_ids is not None
        if answer_token_ids is not None:
            self._answer_ids = torch.tensor(checked_answer_ids(answer_token_ids))
        self.model: PreTrainedModel | None = None
        if isinstance(model, PreTrainedModel):
            self._check_model(model)
            self.model = model

    def _check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model that cannot be fine-tuned that way."""
        raise NotImplementedError

    def _prepare(self, model: PreTrainedModel) -> Sequence[ExpertLayer]:
        """Prepare a checked model for training; returns layers in all of its blocks, for sharding. Idempotent."""
        raise NotImplementedError

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, as in `self.named_parameters()`."""
        raise NotImplementedError

    def stored_names(self) -> set[str]:
        """Names of the tensors that a checkpoint contains: the trained parameters, and buffers that belong to them."""
        return set(self.trained_parameters())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained parameters in groups of the optimizer."""
        return [{"params": list(self.trained_parameters().values())}]

    def setup(self, stage: str) -> None:
        """Read the answer tokens from the trainer's datamodule, unless they were passed as an argument.

        Raises:
            ValueError: If neither has them.
        """
        if self._answers_are_given:
            return
        datamodule = getattr(self.trainer, "datamodule", None)
        if hasattr(datamodule, _ANSWERS_KEY):
            found = getattr(datamodule, _ANSWERS_KEY)
            self._answer_ids = None if found is None else torch.tensor(checked_answer_ids(found))
        elif self._answer_ids is None:
            raise ValueError(
                f"the answer tokens are unknown; pass {type(self).__name__}(answer_token_ids=[...]), or a datamodule "
                "with the attribute answer_token_ids, such as MultipleChoiceDataModule, to the trainer"
            )

    def configure_model(self) -> None:
        """Load the model if it was given as a string, and freeze all but what is trained. Idempotent.

        Under `ModelParallelStrategy` its blocks are sharded with FSDP2; see `load`.

        Raises:
            ModelUnavailableError: If the model cannot be loaded; see `load_causal_model`.
            RuntimeError: If another rank of `ModelParallelStrategy` failed to load the model.
            ValueError: If the model cannot be fine-tuned that way, or the strategy uses tensor parallelism.
        """
        if self.device_mesh is None:
            self.load()
            return
        check_tensor_parallel(self.device_mesh)
        self.load(self.device_mesh["data_parallel"])

    def load(self, mesh: DeviceMesh | None = None) -> None:
        """Load the model if it was given as a string, freeze all but what is trained, and shard blocks with FSDP2.

        Before it is sharded, each rank loads the unsharded model into CPU memory. The ranks of a node load it
        sequentially, so all of them must call this, and the timeout of their process group must be longer than the
        loading takes (`ModelParallelStrategy(timeout=...)`, 30 minutes by default).

        Args:
            mesh: One-dimensional device mesh over which the weights are sharded; None shards nothing.

        Raises:
            ModelUnavailableError: If the model cannot be loaded; see `load_causal_model`.
            RuntimeError: If there is a mesh, and another rank failed to load the model.
            ValueError: If the model cannot be fine-tuned that way.
        """
        if mesh is not None and self.model is None:
            sequential_per_node(lambda: self._load(mesh))
        else:
            self._load(mesh)

    def _load(self, mesh: DeviceMesh | None) -> None:
        model = self.model
        if model is None:
            assert self._source is not None
            model = load_causal_model(self._source, self.dtype_name)
            self._check_model(model)
        layers = self._prepare(model)
        self.model = model
        model.requires_grad_(False)
        for parameter in self.trained_parameters().values():
            parameter.requires_grad_(True)
        if mesh is not None:
            shard_blocks(model, layers, mesh)

    def configure_callbacks(self) -> list[Callback]:
        """Add a callback that calls `release` after an exception, for which a LightningModule has no hook."""
        # A reused trainer has the callback already, and would warn that it is replaced.
        known = any(isinstance(callback, _ReleaseOnException) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if known else [_ReleaseOnException()]

    def class_logits(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Logits of the answer tokens at the last non-padding position of each prompt, or of the texts of the choices.

        Args:
            batch: Batch as described in the class docstring.

        Returns:
            Logits `[B, K]`, at least float32, `-inf` where `choice_mask` is False; labels `[B]`, or None.

        Raises:
            RuntimeError: If the model is not loaded or the answer tokens are not known yet.
            ValueError: If the number of choices in `choice_mask` differs from the number of answer tokens.
        """
        model = self._ready()
        if has_choice_tokens(batch):
            return choice_logits(model, batch), batch.get("label")
        if self._answer_ids is None:
            raise RuntimeError(
                f"the answer tokens are not known yet; pass {type(self).__name__}(answer_token_ids=[...]), or let a "
                "trainer set up the module with a datamodule that has answer_token_ids"
            )
        return answer_logits(model, batch, self._answer_ids), batch.get("label")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy over the choices of each question, averaged; logs `train/loss`.

        Raises:
            ValueError: If the batch has no labels.
        """
        logits, labels = self._labelled(batch)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log `val/loss` and `val/acc`."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log `test/loss` and `test/acc`."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Predict a batch: `log_probs [B, K]` float32 and, where the batch has it, `index [B]`, both on the CPU."""
        logits, _ = self._answered(batch)
        prediction = {"log_probs": logits.log_softmax(-1).float().cpu()}
        if "index" in batch:
            prediction["index"] = batch["index"].cpu()
        return prediction

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the trained parameters, with a learning-rate scheduler that steps after every optimizer step.

        Raises:
            ValueError: If the schedule needs the number of training steps and the trainer does not know it, or weights
                in float16 shall be rounded stochastically.
        """
        optimizer = make_adamw(
            self.parameter_groups(),
            self.half_precision_updates,
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
        )
        total = self.trainer.estimated_stepping_batches
        scheduler = make_scheduler(optimizer, self.schedule, total, self.warmup_fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Set training mode: `from_pretrained` returns the model in evaluation mode, and Lightning preserves modes."""
        self.train()

    def on_train_start(self) -> None:
        """Watch whether the weights move."""
        self._undo.callback(watch_moved_weights(self.trainer))

    def on_train_end(self) -> None:
        """Undo what training has added to the model."""
        self.release()

    def teardown(self, stage: str) -> None:
        """Undo what training has added to the model if it was interrupted."""
        self.release()

    def release(self) -> None:
        """Undo what training has added to the model, such as expert dropout. Idempotent."""
        self._undo.close()
        self.shared_logits.withdraw()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store only the trained tensors, and the answer tokens.

        A sharded checkpoint, of which each rank writes its shards, stores all tensors: Lightning loads all of them.
        """
        state = checkpoint["state_dict"]
        if not any(isinstance(value, Tensor) and is_sharded(value) for value in state.values()):
            # Under ModelParallelStrategy only rank zero has the full state dict.
            checkpoint["state_dict"] = {name: state[name] for name in state if name in self.stored_names()}
        if self._answer_ids is not None:
            checkpoint[_ANSWERS_KEY] = self._answer_ids.tolist()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint contains exactly the tensors that this module trains.

        Raises:
            RuntimeError: If tensors are missing or unexpected; the message names them.
        """
        stored = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        # A command line stores lists for tuples, and of a subclass its own arguments only.
        here, then = (
            {n: list(v) if isinstance(v := known.get(n), tuple) else v for n in self.decisive}
            for known in (self.hparams, stored)
        )
        differ = any(then[n] != here[n] for n in self.decisive if n in stored and n in self.hparams)
        expected = self.stored_names()
        # ModelParallelStrategy has loaded the state dict, and does not pass it on.
        found = set(checkpoint.get("state_dict", expected if stored and not differ else ()))
        if expected != found or differ:
            raise RuntimeError(
                f"the checkpoint does not contain the tensors that this module trains ({_arguments(here)}; the "
                f"checkpoint says {_arguments(then)}): missing are {first_names(expected - found)}, unexpected are "
                f"{first_names(found - expected)}. Pass the model and the arguments with which it was saved."
            )
        if self._answer_ids is None and _ANSWERS_KEY in checkpoint:
            self._answer_ids = torch.tensor(checked_answer_ids(checkpoint[_ANSWERS_KEY]))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict; frozen tensors may be missing and are not reported.

        Raises:
            RuntimeError: If shapes differ, or, with `strict`, a trained tensor is missing or a name is unknown.
        """
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        trained = self.stored_names()
        missing = [name for name in found.missing_keys if name in trained]
        if strict and (missing or found.unexpected_keys):
            raise RuntimeError(
                f"missing are {first_names(missing)}, unexpected are {first_names(found.unexpected_keys)}: these "
                f"tensors belong to another model, or to other values of {', '.join(self.decisive)}; pass those with "
                "which they were saved"
            )
        return type(found)(missing, found.unexpected_keys)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        # Precision "bf16-true" casts the module as a whole.
        with nullcontext() if self.model is None else unrounded_buffers(self.model):
            return super()._apply(fn, recurse)

    def _evaluate(self, batch: Mapping[str, Tensor], stage: Literal["val", "test"]) -> None:
        log = partial(self._log_evaluation, stage)
        if not (self._has_own_step(stage) and self.shared_logits.ask(batch, log)):
            log(*_checked_labels(batch, *self._answered(batch)))

    def _log_evaluation(self, stage: Literal["val", "test"], logits: Tensor, labels: Tensor) -> None:
        values = {
            f"{stage}/loss": nn.functional.cross_entropy(logits, labels),
            f"{stage}/acc": (logits.argmax(-1) == labels).float().mean(),
        }
        self.log_dict(values, batch_size=len(labels), on_step=False, on_epoch=True, sync_dist=True)

    def _has_own_step(self, stage: Literal["val", "test"]) -> bool:
        """Whether the step is not overridden: one that is may change inputs or weights around this one."""
        name = "test_step" if stage == "test" else "validation_step"
        return name not in vars(self) and getattr(type(self), name) is getattr(Finetuner, name)

    def _answered(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Logits or log-probabilities `[B, K]` that validation, test and prediction report, and labels."""
        return self.class_logits(batch)

    def _labelled(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return _checked_labels(batch, *self.class_logits(batch))

    def _plain_answers(self) -> list[int] | None:
        return None if self._answer_ids is None else self._answer_ids.tolist()

    def _ready(self) -> PreTrainedModel:
        if self.model is None:
            raise RuntimeError(f"the model {self._source!r} is not loaded yet; call configure_model() first")
        return self.model


def _checked_labels(batch: Mapping[str, Tensor], logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    if labels is None:
        raise ValueError(f"this step needs labels, and the batch has no 'label' (it has {sorted(batch)}); add one")
    return logits, labels


class _ReleaseOnException(Callback):
    """Undoes what training has added to a module's model after an exception."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # The trainer may be used with a module of another class by now.
        if isinstance(pl_module, Finetuner):
            pl_module.release()


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
