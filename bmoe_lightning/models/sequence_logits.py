"""Log-probabilities of whole texts after their prompts, several texts in one row or one in each.

Shapes: `R` rows, `T` tokens, `B` texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bmoe_lightning.models.attention_masks import pair_mask
from bmoe_lightning.models.last_logits import logits_at


@dataclass(frozen=True)
class TextScores:
    """What a model says of the answers of texts.

    Attributes:
        log_prob: `log p(y | x)`, the sum of log-probabilities of the answer's tokens `[B]`, at least float32.
        token_entropy: Mean entropy of the next-token distribution over the answer's tokens `[B]`, in nats.
        num_tokens: Number of the answer's tokens `[B]` int64.
    """

    log_prob: Tensor
    token_entropy: Tensor
    num_tokens: Tensor


def text_scores(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> TextScores:
    """Score the answers of a batch of texts in one forward pass.

    Args:
        model: Causal language model. For several texts in a row one that passes an attention mask `[R, 1, T, T]` on,
            which those with eager or SDPA attention over all positions do.
        batch: `input_ids`, `attention_mask` and `answer_mask` `[R, T]`, the last one nonzero for the tokens of answers;
            and maybe `text_index` `[R, T]` int64, the number of the text that a token belongs to, from 0 to B - 1, for
            several texts in one row. Without it each row is a text. The tokens of a text follow one another.

    Returns:
        Scores of the texts, in the order of their numbers; with graph where gradients are enabled.

    Raises:
        ValueError: If shapes differ, a text has no answer, no token precedes it, its tokens do not follow one another,
            or texts that share a row are longer than a window of the model's attention.
    """
    ids, mask, answer = batch["input_ids"], batch["attention_mask"].ne(0), batch["answer_mask"].ne(0)
    numbers = batch.get("text_index")
    given = [mask, answer, *([] if numbers is None else [numbers])]
    if ids.dim() != 2 or any(value.shape != ids.shape for value in given):
        shapes = ", ".join(str(tuple(value.shape)) for value in (ids, *given))
        raise ValueError(
            f"input_ids, attention_mask, answer_mask and text_index must have one shape [R, T], got {shapes}"
        )
    packed = numbers is not None
    texts = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(ids) if numbers is None else numbers
    answer = answer & mask
    size = int(torch.where(mask, texts, -1).max()) + 1 if packed else len(ids)
    if not bool(mask.any()):
        raise ValueError("there is no text in the batch: its attention_mask is zero everywhere")
    begins = mask.clone()  # the first token of each text
    begins[:, 1:] &= ~(mask[:, :-1] & (texts[:, 1:] == texts[:, :-1]))
    _check(texts, mask, begins, answer, size)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    positions = torch.where(mask, places - torch.where(begins, places, 0).cummax(1).values, 0)
    row, place = answer.nonzero(as_tuple=True)
    kept, column = (place - 1).unique(return_inverse=True)
    if packed:
        _check_packed(model, torch.bincount(texts[mask]))
        same = texts.unsqueeze(2) == texts.unsqueeze(1)
        attention = pair_mask(model, mask.unsqueeze(1) & same & (places.unsqueeze(2) >= places.unsqueeze(1)))
    else:
        attention = mask.long()
    logits = logits_at(model, ids, attention, kept, position_ids=positions)[row, column]
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    found = log_probs.gather(1, ids[row, place].unsqueeze(1)).squeeze(1)
    of_text = texts[row, place]
    count = torch.zeros(size, dtype=torch.int64, device=ids.device).index_add(0, of_text, torch.ones_like(of_text))
    with torch.no_grad():
        entropy = torch.special.entr(log_probs.exp()).sum(-1)
    zeros = found.new_zeros(size)
    return TextScores(zeros.index_add(0, of_text, found), zeros.index_add(0, of_text, entropy) / count, count)


def sequence_log_prob(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """`log p(y | x)` of the answers of a batch `[B]`; arguments and errors as of `text_scores`."""
    return text_scores(model, batch).log_prob


def _check_packed(model: PreTrainedModel, lengths: Tensor) -> None:
    """Refuse texts in one row where the model's layers do not take the mask that keeps them apart, or need another."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    has_window = "sliding_attention" in kinds and getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None) if has_window else None
    longest = int(lengths.max())
    other = kinds - {"full_attention", "sliding_attention"}
    if other or (window is not None and longest > window):
        what = f"layers of the kind {', '.join(sorted(other))}" if other else f"a window of {window} tokens"
        raise ValueError(
            f"{type(model).__name__} has {what}, so texts of up to {longest} tokens cannot share a row; give each text "
            "its own row, without text_index"
        )


def _check(texts: Tensor, mask: Tensor, begins: Tensor, answer: Tensor, size: int) -> None:
    if bool((texts[mask] < 0).any()):
        raise ValueError("text_index must be 0 or more for every token; of padding it does not matter")
    for where, what in ((begins, "has no token, or tokens in several places"), (answer, "has no answer")):
        count = torch.zeros(size, dtype=torch.int64, device=texts.device)
        count.index_add_(0, texts[where], torch.ones_like(texts[where]))
        wrong = count != 1 if where is begins else count < 1
        if bool(wrong.any()):
            raise ValueError(
                f"text {int(wrong.nonzero()[0])} of the batch {what}; give each text tokens that follow one another in "
                "one row, the last of which are its answer's"
            )
    first = begins & answer
    if bool(first.any()):
        raise ValueError(
            f"text {int(texts[first][0])} of the batch begins with its answer, which nothing predicts; put a prompt "
            "before it"
        )
