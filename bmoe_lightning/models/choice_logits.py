"""Logits of choices that are texts: log-probabilities of their tokens after the prompt.

Shapes: `B` questions, `K` choices, `M` rows of the batch for each question, `R` rows of the model's input, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bmoe_lightning.models.attention_masks import pair_mask
from bmoe_lightning.models.last_logits import logits_at

PROMPT = -1
"""What `choice_index` is for tokens of no choice."""


def has_choice_tokens(batch: Mapping[str, Tensor]) -> bool:
    """Whether a batch has the tokens of its choices, which `choice_logits` scores."""
    return "choice_index" in batch


def choice_logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probability of the tokens of each choice after its prompt, divided by `choice_length`.

    Each choice has a row of its own (M = K), or one row has the prompt and after it all choices (M = 1). In the latter
    a token sees the prompt and the tokens of its own choice before it, and its position is that in a row of its own.
    The model runs on no row for choices that a question lacks.

    Args:
        model: Causal language model. For M = 1 one that passes an attention mask `[R, 1, T, T]` on, which those with
            eager or SDPA attention over all positions do.
        batch: `input_ids`, `attention_mask` and `choice_index` `[B, M, T]`, `choice_mask` `[B, K]` bool and
            `choice_length` `[B, K]`; see `bmoe_lightning.data.cloze.ClozeBatch`. In each row the prompt comes first,
            and the tokens of a choice follow one another.

    Returns:
        `[B, K]`, at least float32, `-inf` where `choice_mask` is False.

    Raises:
        ValueError: If M is neither 1 nor K, a choice has no token or follows no prompt, or the model cannot share a row
            among choices.
    """
    ids, mask, present = batch["input_ids"], batch["attention_mask"].ne(0), batch["choice_mask"]
    num_choices = present.shape[1]
    if ids.dim() != 3 or ids.shape[1] not in (1, num_choices):
        raise ValueError(
            f"input_ids have the shape {tuple(ids.shape)} for {num_choices} choices; give [B, {num_choices}, T], a row "
            "for each choice, or [B, 1, T]"
        )
    used = mask.any(-1)
    _check_tokens(batch["choice_index"], mask, present)
    rows = _Rows(ids[used], mask[used], batch["choice_index"][used])
    scores = rows.scores(model, num_choices, shared=ids.shape[1] == 1)
    of_rows = scores.new_zeros(*used.shape, num_choices)
    of_rows[used] = scores
    return (of_rows.sum(1) / batch["choice_length"].to(scores.dtype)).masked_fill(~present, -torch.inf)


def _check_tokens(choices: Tensor, mask: Tensor, present: Tensor) -> None:
    scored = choices != PROMPT
    numbers = torch.arange(present.shape[1], device=choices.device)
    has_tokens = (choices.unsqueeze(3) == numbers).flatten(1, 2).any(1)
    prompts = (mask & ~scored).any(2) | ~scored.any(2)
    first = (mask.cumsum(2) == 1) & mask & scored
    lacking, first_in_row = (present & ~has_tokens).any(1), (~prompts | first.any(2)).any(1)
    for found, what in (
        (lacking, "has a choice without tokens, whose score would be that of certainty; mask it in choice_mask"),
        (first_in_row, "has a row that begins with a choice; put the tokens of its prompt first"),
    ):
        if bool(found.any()):
            raise ValueError(f"example {int(found.nonzero()[0])} of the batch {what}")


class _Rows:
    """Rows of the model's input, each with tokens of a prompt and then of at least one choice."""

    def __init__(self, ids: Tensor, mask: Tensor, choices: Tensor) -> None:
        self._ids, self._mask, self._choices = ids, mask, choices
        self._scored = choices != PROMPT
        places = torch.arange(ids.shape[1], device=ids.device)
        begin = self._scored.int().argmax(1, keepdim=True)
        follows = torch.zeros_like(self._scored)
        follows[:, 1:] = choices[:, 1:] == choices[:, :-1]
        # The position whose next token each scored token is: the end of the prompt for the first one of a choice.
        self._before = torch.where(follows, places - 1, begin - 1)
        order = mask.cumsum(1) - 1
        first = self._scored & ~follows
        start = torch.where(first, order, 0).cummax(1).values
        prompt = order.gather(1, begin)
        self._positions = torch.where(self._scored, prompt + order - start, order).clamp(min=0)

    def scores(self, model: PreTrainedModel, num_choices: int, *, shared: bool) -> Tensor:
        """Sums of log-probabilities of the tokens of each choice, `[R, K]`, 0 for choices of which a row has none."""
        row, place = self._scored.nonzero(as_tuple=True)
        before = self._before[row, place]
        predicting = torch.zeros_like(self._scored)
        predicting[row, before] = True
        kept = predicting.any(0).nonzero().squeeze(1)
        mask = self._attention(model) if shared else self._mask.long()
        logits = logits_at(model, self._ids, mask, kept, position_ids=self._positions)
        # Of the rows that predict a token alone: others may hold NaN at positions of padding.
        logits = logits[predicting[:, kept]]
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        number = predicting.flatten().cumsum(0).view_as(predicting) - 1
        found = log_probs[number[row, before], self._ids[row, place]]
        of_tokens = found.new_zeros(self._ids.shape).index_put((row, place), found)
        of_choice = self._choices.unsqueeze(2) == torch.arange(num_choices, device=self._choices.device)
        return (of_tokens.unsqueeze(2) * of_choice).sum(1)

    def _attention(self, model: PreTrainedModel) -> Tensor:
        """The mask `[R, 1, T, T]` by which a token sees the prompt and the tokens of its own choice before it."""
        places = torch.arange(self._ids.shape[1], device=self._ids.device)
        earlier = places.unsqueeze(1) >= places
        of_prompt = (self._choices == PROMPT).unsqueeze(1)
        of_same = self._choices.unsqueeze(2) == self._choices.unsqueeze(1)
        seen = earlier & self._mask.unsqueeze(1) & (of_prompt | of_same)
        return pair_mask(model, seen)
