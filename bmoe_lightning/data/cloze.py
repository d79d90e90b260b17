"""Questions whose answer is the text of a choice: tokens of the prompt and of each choice, and their batches.

A choice is scored by the log-probability of its tokens after the prompt, as lm-evaluation-harness does
(https://github.com/EleutherAI/lm-evaluation-harness, `loglikelihood`). Prompt and choice are encoded together: of a
text in two parts a tokenizer may merge the end of one and the beginning of the other. The prompt's tokens are those
that it has in common with the prompt before every choice; all that follow are the choice's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bmoe_lightning.data.batches import Batch, Collate, EncodedQuestion
from bmoe_lightning.data.prompts import PromptFormat, encode_prompts
from bmoe_lightning.data.questions import LETTERS, Question
from bmoe_lightning.data.truncation import longest_cut
from bmoe_lightning.utils.messages import shown

Normalisation = Literal["sum", "characters", "bytes"]
"""What the log-probability of a choice is divided by: 1, or the number of characters or UTF-8 bytes of its text."""

_LENGTHS: dict[Normalisation, Callable[[str], int]] = {
    "sum": lambda _: 1,
    "characters": len,
    "bytes": lambda text: len(text.encode()),
}


def check_cloze(prompt_format: PromptFormat, normalise: str, shared_prompts: object) -> None:
    """Check the options of choices that are scored by their text.

    Args:
        prompt_format: The prompt format, which may be another one.
        normalise: What log-probabilities are divided by.
        shared_prompts: Whether choices share the row of their prompt: a bool, or `auto`.

    Raises:
        ValueError: If one is unknown, or is given though the prompt format is another one.
    """
    if normalise not in _LENGTHS:
        raise ValueError(f"normalise is {normalise!r}; it must be one of {', '.join(_LENGTHS)}")
    if shared_prompts not in ("auto", True, False):
        raise ValueError(f"shared_prompts is {shared_prompts!r}; it must be 'auto', True or False")
    if not prompt_format.cloze and (normalise != "sum" or shared_prompts != "auto"):
        raise ValueError(
            "normalise and shared_prompts are for choices that are scored by their text, and the answers of the prompt "
            f"{prompt_format.name!r} are single tokens; use prompt='cloze', or leave both out"
        )


class ClozeBatch(Batch):
    """One batch of questions with the tokens of their choices.

    `input_ids` and `attention_mask` are `[B, M, T]`: either M = K_max rows for each question, one for each choice, of
    which a question with fewer choices leaves some empty; or M = 1, the prompt and after it all choices, none of which
    sees another one. `choice_index` `[B, M, T]` int64 is the choice that a token belongs to, -1 for the prompt and for
    padding. `choice_length` `[B, K_max]` float32 is what the log-probability of each choice is divided by.
    """

    choice_index: Tensor
    choice_length: Tensor


@dataclass(frozen=True)
class _Tokens:
    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        """Number of tokens of the prompt and its longest choice."""
        return len(self.prompt) + max(map(len, self.choices))


def fit_cloze(
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    questions: Sequence[Question],
    max_length: int,
    normalise: Normalisation = "sum",
) -> tuple[list[EncodedQuestion], int]:
    """Encode questions and their choices, each with its prompt in at most `max_length` tokens.

    Words of the passage, or else of the question, are truncated as by `fit_prompts`; choices never are.

    Args:
        tokenizer: Tokenizer, whose settings are not changed.
        prompt_format: Prompt format, a cloze.
        questions: Questions to encode.
        max_length: Maximum number of tokens of a prompt and a choice, leading special tokens included.
        normalise: What log-probabilities are divided by.

    Returns:
        `(encoded questions, number of truncated prompts)`.

    Raises:
        PromptTooLongError: If a question does not fit.
        ValueError: If a choice has no token, or no token precedes it.
    """
    length = _LENGTHS[normalise]
    tokens = _encode(tokenizer, prompt_format, questions)
    long = [row for row, found in enumerate(tokens) if found.longest > max_length]
    for row in long:
        question = questions[row]

        def encode(prompt: str, question: Question = question) -> _Tokens:
            answers = prompt_format.answers(question)
            texts = [prompt, *(f"{prompt} {answer}" for answer in answers)]
            whole = encode_prompts(tokenizer, texts, questions=[question] * len(texts))
            return _split(question, whole[0], whole[1:])

        tokens[row] = longest_cut(prompt_format, question, max_length, encode, lambda found: found.longest)
    return [
        EncodedQuestion(
            found.prompt,
            len(question.choices),
            question.answer,
            index,
            choices=found.choices,
            lengths=tuple(float(length(text.strip())) for text in question.choices),
        )
        for index, (found, question) in enumerate(zip(tokens, questions, strict=True))
    ], len(long)


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, questions: Sequence[Question]
) -> list[_Tokens]:
    prompts = [prompt_format.render(question) for question in questions]
    texts = [
        f"{prompt} {answer}"
        for prompt, question in zip(prompts, questions, strict=True)
        for answer in prompt_format.answers(question)
    ]
    asked = [question for question in questions for _ in question.choices]
    whole = iter(encode_prompts(tokenizer, texts, questions=asked))
    return [
        _split(question, ids, [next(whole) for _ in question.choices])
        for question, ids in zip(questions, encode_prompts(tokenizer, prompts, questions=questions), strict=True)
    ]


def _split(question: Question, prompt: Sequence[int], whole: Sequence[Sequence[int]]) -> _Tokens:
    """Split the tokens of the prompt before each choice where they cease to be those of the prompt alone.

    Where the tokenizer merges the end of the prompt with one choice, the tokens of every choice begin there, so that
    the scores of all choices are given the same tokens.
    """
    common = min(sum(1 for _ in takewhile(_are_same, zip(prompt, ids, strict=False))) for ids in whole)
    for letter, ids in zip(LETTERS, whole, strict=False):
        if len(ids) <= common:
            raise ValueError(
                f"question {shown(question.id)}: the tokenizer encodes choice {letter} as no token; drop or repair "
                "the item"
            )
    if not common:
        raise ValueError(
            f"question {shown(question.id)}: the tokenizer encodes the prompt differently from its first token on when "
            "a choice follows, so no token is left that the choices could be given; use a tokenizer that encodes a "
            "text from the left to the right"
        )
    return _Tokens(tuple(prompt[:common]), tuple(tuple(ids[common:]) for ids in whole))


def _are_same(pair: tuple[int, int]) -> bool:
    return pair[0] == pair[1]


def indistinct(questions: Sequence[EncodedQuestion]) -> int:
    """Number of questions with two choices of the same tokens, whose scores are equal."""
    return sum(len(set(question.choices)) < len(question.choices) for question in questions)


@dataclass(frozen=True)
class ClozeCollate(Collate):
    """Pads encoded questions with the tokens of their choices, and stacks them.

    Args:
        shared: Whether the choices of a question share one row and the tokens of its prompt; otherwise each choice has
            its own.
    """

    shared: bool = False

    def __call__(self, items: Sequence[EncodedQuestion]) -> ClozeBatch:
        """Collate items into a batch.

        Args:
            items: Questions of one split, with the tokens of their choices.
        """
        laid_out = [_shared_row(item) if self.shared else _rows(item) for item in items]
        width = max(len(ids) for rows in laid_out for ids, _ in rows)
        shape = (len(items), 1 if self.shared else self.num_choices, width)
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        choice_index = torch.full(shape, -1, dtype=torch.int64)
        choice_length = torch.ones(len(items), self.num_choices)
        for example, (item, rows) in enumerate(zip(items, laid_out, strict=True)):
            choice_length[example, : len(item.lengths)] = torch.tensor(item.lengths)
            for row, (ids, choices) in enumerate(rows):
                place = (example, row, self.place(len(ids), width))
                input_ids[place] = torch.tensor(ids)
                attention_mask[place] = 1
                choice_index[place] = torch.tensor(choices)
        return ClozeBatch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            choice_index=choice_index,
            choice_length=choice_length,
            **self.targets(items),
        )


def _rows(item: EncodedQuestion) -> list[tuple[list[int], list[int]]]:
    """Tokens, and the choices that they belong to, of a row for each choice."""
    return [
        ([*item.token_ids, *choice], [-1] * len(item.token_ids) + [number] * len(choice))
        for number, choice in enumerate(item.choices)
    ]


def _shared_row(item: EncodedQuestion) -> list[tuple[list[int], list[int]]]:
    """Tokens, and the choices that they belong to, of one row for all choices."""
    ids, choices = list(item.token_ids), [-1] * len(item.token_ids)
    for number, choice in enumerate(item.choices):
        ids += choice
        choices += [number] * len(choice)
    return [(ids, choices)]
