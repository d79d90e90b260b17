"""Logits of the answer tokens of multiple-choice prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bmoe_lightning.models.last_logits import last_logits


def answer_logits(model: PreTrainedModel, batch: Mapping[str, Tensor], answer_ids: Tensor) -> Tensor:
    """Logits of the answer tokens at the last non-padding position of each prompt.

    Args:
        model: Causal language model.
        batch: `input_ids` and `attention_mask` `[B, T]`, and optionally `choice_mask` `[B, K]`, bool.
        answer_ids: Token id of each choice, `[K]`, or of the choices of each question, `[B, K]`.

    Returns:
        Logits `[B, K]`, at least float32, `-inf` where `choice_mask` is False.

    Raises:
        ValueError: If the number of choices in `choice_mask` differs from the number of answer tokens.
    """
    logits = last_logits(model, batch["input_ids"], batch["attention_mask"])
    logits = logits[:, answer_ids] if answer_ids.dim() == 1 else logits.gather(1, answer_ids)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    present = batch.get("choice_mask")
    if present is None:
        return logits
    if present.shape != logits.shape:
        raise ValueError(
            f"choice_mask has shape {tuple(present.shape)}, but there are {logits.shape[1]} answer tokens for "
            f"{logits.shape[0]} questions; pass answer_token_ids with one token for each choice of the widest "
            "question"
        )
    return logits.masked_fill(~present, -torch.inf)


def checked_answer_ids(ids: Sequence[int] | Tensor) -> list[int]:
    """Answer tokens as a list of ints.

    Raises:
        ValueError: If there are fewer than two tokens, a token is negative, or two choices share one.
    """
    answers = [int(token) for token in ids]
    if len(answers) < 2 or min(answers) < 0 or len(set(answers)) < len(answers):
        raise ValueError(
            f"answer_token_ids must be two or more different token ids, one for each choice; got {answers}"
        )
    return answers
