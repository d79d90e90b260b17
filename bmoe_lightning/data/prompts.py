"""Prompts that end right before a lettered answer, and the tokens that answer them.

A question is answered by the next token after `Answer:`, among the letters of its choices. The answer token is the
letter *with* its leading space (` A`), because that is what a model generates; scoring the bare letter costs accuracy
and calibration. The two formats follow the styles named in appendix C of https://arxiv.org/abs/2511.08968, reworded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bmoe_lightning.data.questions import LETTERS, Question


@dataclass(frozen=True)
class PromptFormat:
    """A prompt template: `head`, passage if any, question, `before_choices`, lettered choices, `tail`.

    Args:
        name: Name of the format.
        head: Text before passage and question.
        before_choices: Text between the question and the first choice.
        separator: Text between two choices.
        tail: Text at the end; the answer token follows it directly, so it must not end in white space.
        after_passage: Text between the passage and the question, where there is a passage.

    Raises:
        ValueError: If `tail` is empty or ends in white space.
    """

    name: str
    head: str
    before_choices: str
    separator: str
    tail: str
    after_passage: str = "\n"

    def __post_init__(self) -> None:
        if not self.tail or self.tail != self.tail.rstrip():
            raise ValueError(
                f"prompt {self.name!r} ends in {self.tail!r}; end it without white space, which is part of the answer"
            )

    def before_question(self, passage: str | None) -> str:
        """The text before the question: the head, and the passage if there is one.

        Args:
            passage: Passage of the question.
        """
        return self.head if passage is None else self.head + passage.strip() + self.after_passage

    def after_question(self, question: Question) -> str:
        """The text after the question: the lettered choices and the tail.

        Args:
            question: Question with the choices.
        """
        choices = (f"{letter}. {text.strip()}" for letter, text in zip(LETTERS, question.choices, strict=False))
        return self.before_choices + self.separator.join(choices) + self.tail

    def render(self, question: Question) -> str:
        """The prompt of a question.

        Args:
            question: Question to format.
        """
        return self.before_question(question.passage) + question.question.strip() + self.after_question(question)


_FORMATS = {
    prompt_format.name: prompt_format
    for prompt_format in (
        PromptFormat(name="letters", head="", before_choices="\n", separator="\n", tail="\nAnswer:"),
        PromptFormat(
            name="instruction",
            head="Select one of the choices that answers the following question: ",
            before_choices=" Choices: ",
            separator=" ",
            tail=" Answer:",
            after_passage=" ",
        ),
    )
}
PROMPT_NAMES = tuple(_FORMATS)


def get_prompt_format(name: str) -> PromptFormat:
    """Look up a prompt format.

    Args:
        name: Name of the format, one of `PROMPT_NAMES`.

    Raises:
        ValueError: If there is no such format.
    """
    if name not in _FORMATS:
        raise ValueError(f"unknown prompt {name!r}; choose from {', '.join(PROMPT_NAMES)}")
    return _FORMATS[name]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The files of a tokenizer may enable truncation and padding.
    return list(tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)["input_ids"])


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer prepends to a text, such as a beginning-of-sequence token.

    Appended ones are left out on purpose: after an end-of-sequence token, the last position no longer predicts the
    answer.

    Args:
        tokenizer: Tokenizer, whose settings are not changed.

    Raises:
        ValueError: If the tokenizer encodes the text itself differently when it adds special tokens.
    """
    text = "Answer:"
    plain = _plain_ids(tokenizer, text)
    framed = list(tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"])
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[:start]
    raise ValueError(
        f"the tokenizer encodes {text!r} as {plain} without and as {framed} with special tokens; "
        "use a tokenizer that only adds special tokens before and after the text"
    )


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Encode prompts without special tokens at the end.

    Args:
        tokenizer: Tokenizer, whose settings are not changed.
        prompts: Texts to encode.

    Returns:
        One list of token ids for each prompt: leading special tokens, then the text, and nothing after it.

    Raises:
        ValueError: If a prompt ends in white space, has no token, or is encoded with a special token at its end.
    """
    for prompt in prompts:
        if not prompt or prompt != prompt.rstrip():
            raise ValueError(f"the prompt ends in {prompt[-12:]!r}; end it without white space")
    if not prompts:
        return []
    leading = leading_special_ids(tokenizer)
    encoded = tokenizer(list(prompts), add_special_tokens=False, truncation=False, padding=False, verbose=False)
    refused = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for prompt, ids in zip(prompts, encoded["input_ids"], strict=True):
        if not ids or ids[-1] in refused:
            shown = tokenizer.convert_ids_to_tokens(list(ids[-3:]))
            raise ValueError(
                f"the prompt that ends in {prompt[-12:]!r} is encoded with {shown} at its end; nothing may follow the "
                "prompt's text; switch off the tokenizer's end-of-sequence token (add_eos_token=False)"
            )
    return [leading + list(ids) for ids in encoded["input_ids"]]


def answer_token_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], num_choices: int) -> Tensor:
    """Find the answer tokens of a tokenizer by encoding prompts with the answers appended.

    Encodes every prompt with and without ` A`, ` B`, ... appended; the difference must be one token. Word-level
    tokenizers drop the space, and the difference is then the bare letter. No position is assumed, unlike in
    `encode("A")[1]`, which presumes a beginning-of-sequence token.

    Args:
        tokenizer: Tokenizer, whose settings are not changed.
        prompts: Some prompts of the task, at least one; several reveal whether the tokens depend on the prompt.
        num_choices: Number of letters, from A on.

    Returns:
        The id of each letter, `[num_choices]` int64.

    Raises:
        ValueError: If a letter is not one token, two letters share a token, or it changes between prompts.
    """
    if not prompts:
        raise ValueError("no prompts were given; pass some prompts of the task")
    if not 2 <= num_choices <= len(LETTERS):
        raise ValueError(f"num_choices is {num_choices}; 2 to {len(LETTERS)} are supported")
    letters = LETTERS[:num_choices]
    first = [_answer_id(tokenizer, prompts[0], letter) for letter in letters]
    for prompt in prompts[1:]:
        ids = [_answer_id(tokenizer, prompt, letter) for letter in letters]
        if ids != first:
            raise ValueError(
                f"the answer tokens depend on the prompt: {tokenizer.convert_ids_to_tokens(first)} and "
                f"{tokenizer.convert_ids_to_tokens(ids)}; use a prompt format whose end is always the same"
            )
    tokens = dict(zip(letters, tokenizer.convert_ids_to_tokens(first), strict=True))
    if len(set(first)) != num_choices:
        raise ValueError(
            f"some letters share a token: {tokens}; train or choose a tokenizer whose vocabulary has the letters "
            f"{letters[0]} to {letters[-1]}"
        )
    if tokenizer.unk_token_id in first:
        raise ValueError(
            f"a letter is unknown to the tokenizer: {tokens}; choose one whose vocabulary has {', '.join(letters)}"
        )
    return torch.tensor(first, dtype=torch.int64)


def _answer_id(tokenizer: PreTrainedTokenizerBase, prompt: str, letter: str) -> int:
    if prompt != prompt.rstrip():
        raise ValueError(f"the prompt ends in {prompt[-12:]!r}; end it without white space")
    before, after = _plain_ids(tokenizer, prompt), _plain_ids(tokenizer, f"{prompt} {letter}")
    answer = after[len(before) :]
    if after[: len(before)] != before or len(answer) != 1:
        shown = tokenizer.convert_ids_to_tokens(after[-4:])
        raise ValueError(
            f"' {letter}' after {prompt[-12:]!r} is not one token: the text then ends in {shown}; "
            "use a tokenizer that has the space and the letter, or the letter, as one token"
        )
    return answer[0]


def fit_prompts(
    tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, questions: Sequence[Question], max_length: int
) -> tuple[list[list[int]], int]:
    """Encode questions in at most `max_length` tokens, truncating words at the front of passage and question only.

    The choices and the end of the prompt are never truncated, unlike by the tokenizer, which would cut off `Answer:`.
    The question loses words only after its passage has none left.

    Args:
        tokenizer: Tokenizer, whose settings are not changed.
        prompt_format: Prompt format.
        questions: Questions to encode.
        max_length: Maximum number of tokens of a prompt, leading special tokens included.

    Returns:
        `(token ids of each prompt, number of truncated prompts)`.

    Raises:
        ValueError: If not even the question's last word fits; the message names the question and both lengths.
    """
    encoded = encode_prompts(tokenizer, [prompt_format.render(question) for question in questions])
    long = [row for row, ids in enumerate(encoded) if len(ids) > max_length]
    for row in long:
        encoded[row] = _cut(tokenizer, prompt_format, questions[row], max_length)
    return encoded, len(long)


def _cut(
    tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, question: Question, max_length: int
) -> list[int]:
    passage, words = (question.passage or "").split(), question.question.split()
    rest = prompt_format.after_question(question)

    def encode(length: int) -> list[int]:
        """The prompt of the last `length` words of passage and question."""
        of_passage = passage[len(passage) - max(0, length - len(words)) :]
        of_question = words[max(0, len(words) - length) :]
        before = prompt_format.before_question(" ".join(of_passage) or None)
        return encode_prompts(tokenizer, [before + " ".join(of_question) + rest])[0]

    best = encode(1)
    if len(best) > max_length:
        raise ValueError(
            f"question {question.id!r}: cut to the last word of its text, the prompt still has {len(best)} tokens, and "
            f"max_length is {max_length}; raise max_length or drop the item"
        )
    # Bisection for the largest number of words that fit; `low` words always do.
    low, high = 1, len(passage) + len(words)
    while high - low > 1:
        middle = (low + high) // 2
        ids = encode(middle)
        if len(ids) <= max_length:
            low, best = middle, ids
        else:
            high = middle
    return best
