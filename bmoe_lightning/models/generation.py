"""Answers that a causal language model writes, by transformers' own `generate`, in the form that they are scored in.

Shapes: `B` prompts of at most `T` tokens, `N` written tokens at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from bmoe_lightning.experts.model_state import evaluation_mode
from bmoe_lightning.utils.random_state import forked_random_state


@dataclass(frozen=True, eq=False)
class GeneratedAnswers:
    """Prompts, each followed by the answer that a model wrote: padding, prompt, answer, padding.

    Attributes:
        input_ids: Token ids `[B, T + N]`.
        attention_mask: Mask `[B, T + N]` int64, one for prompt and answer.
        answer_mask: Mask `[B, T + N]` int64, one for the answer, its end token included.
        prompt_lengths: Number of tokens of each prompt, `[B]` int64.
        text: The answers as text, without special tokens; None without a tokenizer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor
    prompt_lengths: Tensor
    text: tuple[str, ...] | None = None

    @property
    def batch(self) -> dict[str, Tensor]:
        """The batch that `text_scores` and `sequence_log_prob` take."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "answer_mask": self.answer_mask}

    def tokens(self) -> list[list[int]]:
        """Token ids of each answer, its end token included."""
        return [row[mask].tolist() for row, mask in zip(self.input_ids, self.answer_mask.bool(), strict=True)]


def generate_answers(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> GeneratedAnswers:
    """Let a model write an answer to each prompt of a batch.

    Greedy, or sampled from the model's own distribution, which the answers are scored by: of the model's
    `generation_config` only the token ids of begin, end and padding are used, and no cut, penalty, ban or beam. A model
    without a padding token needs none. The model's modes, its `generation_config` and the global random state are
    restored.

    Args:
        model: Causal language model of transformers.
        batch: `input_ids` and `attention_mask` `[B, T]` of the prompts, padded on either side.
        max_new_tokens: Largest number of tokens of an answer; one that has no end token by then ends there.
        temperature: Temperature of sampling; None decodes greedily.
        seed: Seed of sampling.
        tokenizer: Tokenizer for `GeneratedAnswers.text`.

    Raises:
        TypeError: If the model cannot generate text after a prompt.
        ValueError: If the prompts are not such tensors, one of them is empty, or a number is out of range.
    """
    ids, mask = _prompts(batch)
    config = _config(model, max_new_tokens, temperature)
    with evaluation_mode(model), _only_token_ids(model), forked_random_state():
        torch.manual_seed(seed)
        generate: Any = model.generate
        written: Tensor = generate(input_ids=ids, attention_mask=mask, generation_config=config)
    width = ids.shape[1]
    answer = _until_end(written[:, width:], model.generation_config.eos_token_id)
    zeros = torch.zeros_like(mask)
    answer_mask = torch.cat([zeros, answer], 1)
    text = None
    if tokenizer is not None:
        rows = [row[of_row] for row, of_row in zip(written, answer_mask.bool(), strict=True)]
        text = tuple(str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows)
    return GeneratedAnswers(written, torch.cat([mask, answer], 1), answer_mask, mask.sum(1), text)


def with_answers(batch: Mapping[str, Tensor], answers: Sequence[Sequence[int]]) -> GeneratedAnswers:
    """Prompts with answers that something else has written, in the form that they are scored in.

    Args:
        batch: `input_ids` and `attention_mask` `[B, T]` of the prompts, padded on either side.
        answers: Token ids of each answer, its end token included.

    Raises:
        ValueError: If the prompts are not such tensors, one of them or an answer is empty, or their numbers differ.
    """
    ids, mask = _prompts(batch)
    if len(answers) != len(ids) or not all(answers):
        raise ValueError(f"there must be an answer of at least one token to each of {len(ids)} prompts, got {answers}")
    rows = [torch.as_tensor(list(answer), dtype=ids.dtype, device=ids.device) for answer in answers]
    answer = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    written = torch.cat([ids, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)], 1)
    answer_mask = torch.cat([torch.zeros_like(mask), answer], 1)
    return GeneratedAnswers(written, torch.cat([mask, answer], 1), answer_mask, mask.sum(1))


def _prompts(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, padded on the left."""
    ids, mask = batch["input_ids"], batch["attention_mask"].ne(0).long()
    if ids.dim() != 2 or ids.shape != mask.shape:
        raise ValueError(
            f"input_ids and attention_mask must have one shape [B, T], got {tuple(ids.shape)} and {tuple(mask.shape)}"
        )
    lengths = mask.sum(1)
    if not len(ids) or not bool(lengths.min()):
        what = f"prompt {int(lengths.argmin())} of the batch has no token" if len(ids) else "there is no prompt"
        raise ValueError(f"{what}; give each prompt one at least, such as the model's begin token")
    order = mask.argsort(dim=1, stable=True)[:, -int(lengths.max()) :]
    return ids.gather(1, order), mask.gather(1, order)


def _config(model: PreTrainedModel, max_new_tokens: int, temperature: float | None) -> GenerationConfig:
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise TypeError(f"{type(model).__name__} continues no prompt; pass a causal language model of transformers")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be above 0, or None for greedy decoding, got {temperature}")
    ids = _token_ids(model)
    end = ids["eos_token_id"]
    # What stands behind an end token, which the masks leave out: any token does, and without end tokens there is none.
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = end[0] if isinstance(end, list) else end or 0
    if temperature is None:
        return GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, **ids)
    # transformers cuts at 50 tokens by default.
    return GenerationConfig(
        do_sample=True, temperature=float(temperature), top_k=0, max_new_tokens=max_new_tokens, **ids
    )


def _token_ids(model: PreTrainedModel) -> dict[str, Any]:
    return {name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


@contextmanager
def _only_token_ids(model: PreTrainedModel) -> Iterator[None]:
    """Leave nothing but the token ids in a model's generation config; under the lock of `evaluation_mode`.

    `generate` takes from it whatever the config that it is called with leaves at None, bans and penalties among others.
    """
    # In place: a model of PEFT gives the object to the model that it wraps.
    options = vars(model.generation_config)
    before, ids = dict(options), _token_ids(model)
    try:
        options.clear()
        options.update(vars(GenerationConfig(**ids)))
        yield
    finally:
        options.clear()
        options.update(before)


def _until_end(written: Tensor, end: int | list[int] | None) -> Tensor:
    """Mask `[B, N]` int64 of the tokens up to the first end token, that one included."""
    if end is None:
        return torch.ones_like(written)
    is_end = torch.isin(written, torch.as_tensor(end, device=written.device)).long()
    return (is_end.cumsum(1) - is_end).eq(0).long()
