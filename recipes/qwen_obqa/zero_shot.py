"""Predictions of the model before fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L
from torch import Tensor

from bmoe_lightning import BayesianMoECallback, MultipleChoiceDataModule
from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.methods import BatchView, Method, Predictions
from bmoe_lightning.methods.base import State


@dataclass(frozen=True)
class ZeroShot(Method):
    """Softmax of the logits of the model before fine-tuning, as a row of the table."""

    name: str = "zero_shot"
    label: str = "Zero-shot"

    def log_probs(self, batch: BatchView, state: State) -> Tensor:  # noqa: ARG002
        """Log-softmax of the logits `[B, K]`."""
        return batch.logits.log_softmax(-1)


ZERO_SHOT = ZeroShot()


def predict_zero_shot(
    callback: BayesianMoECallback, trainer: L.Trainer, module: Finetuner, data: MultipleChoiceDataModule
) -> Predictions:
    """Predict the test split with a model that was not fine-tuned. A collective.

    Args:
        callback: Callback of the trainer, with `ZERO_SHOT` as its only method.
        trainer: Trainer, which runs no training step.
        module: The model.
        data: Its DataModule, which is not used for anything else afterwards.

    Returns:
        The predictions, on every rank.
    """
    # A validation, since a test needs a fit.
    data.val_dataloader = data.test_dataloader  # type: ignore[method-assign]
    trainer.validate(module, datamodule=data, verbose=False)
    return callback.predictions["val"][ZERO_SHOT.name]
