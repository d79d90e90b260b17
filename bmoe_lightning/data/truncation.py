"""Prompts that are longer than their window: words of the passage, or else of the question, are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from bmoe_lightning.data.prompts import PromptFormat, encode_prompts
from bmoe_lightning.data.questions import Question
from bmoe_lightning.utils.messages import shown

T = TypeVar("T")

TRUNCATED = "words were cut from their passage, or from the front of a question without one"
"""What is said of prompts that were longer than their window."""


class TruncationWarning(UserWarning):
    """Prompts were longer than their window, and words of them were left out."""


class PromptTooLongError(ValueError):
    """A prompt is longer than its window, however many words are left out.

    Attributes:
        found: What was found, without the remedy: `max_length` is none of whoever serves a model.
    """

    def __init__(self, found: str, max_length: int) -> None:
        super().__init__(f"{found}, and max_length is {max_length}; raise max_length or drop the item")
        self.found = found


def fit_prompts(
    tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, questions: Sequence[Question], max_length: int
) -> tuple[list[list[int]], int]:
    """Encode questions in at most `max_length` tokens, truncating words of the passage, or else of the question.

    The words furthest from the question go first: those at the front of a passage that stands before its
    question, those at the end of one that follows it. A question with a passage is never truncated; one without loses
    words at its front. The choices and the end of the prompt are never truncated, unlike by the tokenizer, which would
    cut off `Answer:`.

    Args:
        tokenizer: Tokenizer, whose settings are not changed.
        prompt_format: Prompt format.
        questions: Questions to encode.
        max_length: Maximum number of tokens of a prompt, leading special tokens included.

    Returns:
        `(token ids of each prompt, number of truncated prompts)`.

    Raises:
        PromptTooLongError: If the question does not fit without its passage, or not even the last word of one that has
            none; the message names the question and both lengths.
        ValueError: As `encode_prompts`.
    """
    encoded = encode_prompts(tokenizer, [*map(prompt_format.render, questions)], questions=questions)
    long = [row for row, ids in enumerate(encoded) if len(ids) > max_length]
    for row in long:
        encoded[row] = longest_cut(
            prompt_format, questions[row], max_length, lambda prompt: encode_prompts(tokenizer, [prompt])[0], len
        )
    return encoded, len(long)


def longest_cut(
    prompt_format: PromptFormat,
    question: Question,
    max_length: int,
    encode: Callable[[str], T],
    length: Callable[[T], int],
) -> T:
    """Encode a question without words of its passage, or else of its text, as few as it takes; see `fit_prompts`.

    Args:
        prompt_format: Prompt format.
        question: Question whose prompt is too long.
        max_length: Maximum number of tokens.
        encode: Function of a prompt.
        length: Number of tokens of what `encode` returns.

    Returns:
        What `encode` returned for the longest prompt that fits.

    Raises:
        PromptTooLongError: If none fits; see `fit_prompts`.
    """
    # What is cut, a passage or else the question, and the least number of its words.
    words = (question.question if question.passage is None else question.passage).split()
    least = 1 if question.passage is None else 0
    from_the_end = question.passage is not None and prompt_format.before_passage is not None

    def cut(count: int) -> T:
        """The prompt with some words of what is cut."""
        text = " ".join(words[:count] if from_the_end else words[len(words) - count :])
        parts = (None, text) if question.passage is None else (text or None, question.question)
        return encode(prompt_format.compose(question, *parts))

    best = cut(least)
    if length(best) > max_length:
        what = "cut to the last word of its text" if least else "without its passage"
        raise PromptTooLongError(
            f"question {shown(question.id)}: {what}, the prompt still has {length(best)} tokens", max_length
        )
    # Bisection for the largest number of words that fit; `low` words always do.
    low, high = least, len(words)
    while high - low > 1:
        middle = (low + high) // 2
        found = cut(middle)
        if length(found) <= max_length:
            low, best = middle, found
        else:
            high = middle
    return best
