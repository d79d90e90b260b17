"""The curvature of texts: that of the log-probability of whole answers, in the form of a problem of two classes.

The Fisher of a text is `E_y[grad log p(y | x) grad log p(y | x)^T]` over answers y that the model itself would write
(`mc`, if the texts are sampled from it), or, with the answers of the training data in their place, the empirical one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.factors import KroneckerFactors
from bmoe_lightning.curvature.kfac import collect_factors
from bmoe_lightning.experts.logits_contract import ClassLogits

SequenceLogProb = Callable[[Any, Any], Tensor]
"""Function `(model, batch) -> log p(y | x) [B]`, with graph."""

# The derivative of the log-probability of the first of two classes with equal logits is half that of its logit.
_SCALE = 2.0


def collect_text_factors(
    model: nn.Module, sequence_log_prob: SequenceLogProb, batches: Iterable[Any], **options: Any
) -> KroneckerFactors:
    """Collect the curvature of every expert from the log-probabilities of texts, one backward pass a batch.

    With the answers of the training data it is the empirical Fisher; with one answer to each prompt that was sampled
    from the model (`bmoe_lightning.models.generate_answers` at temperature 1) an estimate of the Fisher itself, which
    does not vanish where the model is sure of its training data.

    Args:
        model: Module with expert layers.
        sequence_log_prob: Function `(model, batch) -> log p(y | x) [B]`, such as
            `bmoe_lightning.models.sequence_log_prob`.
        batches: Batches that it accepts. A text counts as one example.
        **options: Options of `collect_factors`, but for `fisher`.

    Raises:
        ValueError: If the function does not return one number for each text; and as `collect_factors`.
    """
    return collect_factors(model, text_class_logits(sequence_log_prob), batches, fisher="empirical", **options)


def text_class_logits(sequence_log_prob: SequenceLogProb) -> ClassLogits:
    """Class logits `[B, 2]` and labels `[B]` whose empirical Fisher is that of the log-probability of the texts.

    Args:
        sequence_log_prob: Function `(model, batch) -> log p(y | x) [B]`.
    """
    return contrast_logits(sequence_log_prob, scale=_SCALE)


def contrast_logits(
    sequence_log_prob: SequenceLogProb, *, scale: float = 1.0, keep: Callable[[Tensor], Tensor] | None = None
) -> ClassLogits:
    """Class logits `[B, 2]` whose contrast has the gradient of the log-probability, and the value 0; labels are 0.

    Log-probabilities of long texts are thousands below zero, and a class that far below another one is read as absent.

    Args:
        sequence_log_prob: The function.
        scale: Factor of the gradient.
        keep: Function of the log-probabilities that gives what stands in place of the labels, `[B, ...]`.
    """

    def class_logits(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        value = sequence_log_prob(model, batch)
        if not isinstance(value, Tensor) or value.dim() != 1 or not value.is_floating_point():
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"sequence_log_prob must return log-probabilities [B], one for each text, got {shape}")
        moved = scale * (value - value.detach())
        labels = value.new_zeros(len(value), dtype=torch.int64) if keep is None else keep(value)
        return torch.stack([moved, torch.zeros_like(moved)], 1), labels

    return class_logits
