"""Prompts that end right before the answer, and the tokens that answer them.

A question is answered by the next token after `Answer:`, among the letters of its choices, or among True and False (or
by the text of a choice, in the format `cloze`: see `bmoe_lightning.data.cloze`). The answer token is the letter or word
*with* its leading space (` A`), because that is what a model generates; scoring the bare letter costs accuracy and
calibration. The formats follow the styles named in appendix C of https://arxiv.org/abs/2511.08968, reworded: there the
prompt with True and False ends in its passage, here, as all others, in `Answer:`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bmoe_lightning.data.questions import LETTERS, Question
from bmoe_lightning.utils.messages import shown


@dataclass(frozen=True)
class PromptFormat:
    """A prompt template: `head`, passage if any, question, `before_choices`, lettered choices, `tail`.

    With `words`, the prompt lists no choices, and one of these words is the answer in place of a letter. With `cloze`,
    it lists none either, and the text of a choice is the answer.

    Args:
        name: Name of the format.
        head: Text before passage and question.
        before_choices: Text between the question and the first choice.
        separator: Text between two choices.
        tail: Text at the end; the answer token follows it directly, so it must not end in white space.
        after_passage: Text between the passage and the question, where there is a passage.
        before_passage: Text between the question and a passage that follows it; None puts the passage first.
        words: Words that are the answers to all questions of this format; empty for letters.
        cloze: Whether the text of a choice is the answer.

    Raises:
        ValueError: If `tail` ends in white space, or is empty and the answer is a letter or word.
    """

    name: str
    head: str
    before_choices: str
    separator: str
    tail: str
    after_passage: str = "\n"
    before_passage: str | None = None
    words: tuple[str, ...] = ()
    cloze: bool = False

    def __post_init__(self) -> None:
        if not (self.tail or self.cloze) or self.tail != self.tail.rstrip():
            raise ValueError(
                f"prompt {self.name!r} ends in {self.tail!r}; end it without white space, which is part of the answer"
            )

    @property
    def lettered(self) -> bool:
        """Whether the prompt lists the choices by letter, and a letter is the answer."""
        return not self.words and not self.cloze

    def compose(self, question: Question, passage: str | None, text: str) -> str:
        """The prompt of a question with another passage or text, such as shorter ones.

        Args:
            question: Question with the choices.
            passage: Passage; None for none.
            text: Text of the question.
        """
        body = text.strip()
        if passage is not None and self.before_passage is not None:
            body += self.before_passage + passage.strip()
        elif passage is not None:
            body = passage.strip() + self.after_passage + body
        choices = ""
        if self.lettered:
            lines = (f"{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, question.choices, strict=False))
            choices = self.before_choices + self.separator.join(lines)
        return self.head + body + choices + self.tail

    def render(self, question: Question) -> str:
        """The prompt of a question.

        Args:
            question: Question to format.
        """
        return self.compose(question, question.passage, question.question)

    def applies(self, question: Question) -> bool:
        """Whether the format can ask a question: with `words`, only one whose choices are these, in any order or case.

        Args:
            question: Any question.
        """
        return not self.words or sorted(map(_folded, question.choices)) == sorted(map(_folded, self.words))

    def answers(self, question: Question) -> tuple[str, ...]:
        """The letter, word or text that answers with each choice; a space stands before it.

        Args:
            question: Question with the choices.

        Raises:
            ValueError: If the format has `words`, and the choices are others.
        """
        if self.lettered:
            return tuple(LETTERS[: len(question.choices)])
        if self.cloze:
            return tuple(choice.strip() for choice in question.choices)
        if not self.applies(question):
            raise ValueError(
                f"question {shown(question.id)} has the choices {shown(list(question.choices))}, and the prompt "
                f"{self.name!r} is answered by {' or '.join(self.words)}; use a prompt format with letters"
            )
        words = {_folded(word): word for word in self.words}
        return tuple(words[_folded(choice)] for choice in question.choices)

    def answers_of_all(self, questions: Sequence[Question]) -> tuple[str, ...]:
        """The letter or word of each class, the same for all questions.

        Args:
            questions: Questions, at least one; with letters, those with fewer choices have the first ones.

        Raises:
            ValueError: If the format has `words`, and the choices of a question are others, or in another order than
                those of the first.
        """
        if self.lettered:
            return self.answers(max(questions, key=lambda question: len(question.choices)))
        first, *rest = questions
        words = self.answers(first)
        for question in rest:
            if self.answers(question) != words:
                raise ValueError(
                    f"the choices of question {shown(question.id)} are in another order than those of "
                    f"{shown(first.id)}, and the prompt {self.name!r} needs one order; bring them into one"
                )
        return words


def _folded(text: str) -> str:
    return text.strip().casefold()


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
        PromptFormat(
            name="true_false",
            head="Answer the question with only True or False: ",
            before_choices="",
            separator="",
            tail=" Answer:",
            before_passage=" Context: ",
            words=("False", "True"),
        ),
        # As lm-evaluation-harness asks OpenBookQA. Its format for ARC, `Question: ...` and `Answer:`, was worse on both
        # with SmolLM2-135M-Instruct: zero-shot accuracy .19 against .23 and .40 against .45, 150 test questions each.
        PromptFormat(name="cloze", head="", before_choices="", separator="", tail="", cloze=True),
    )
}
PROMPT_NAMES = tuple(_FORMATS)
LETTERED_PROMPT_NAMES = tuple(name for name, prompt_format in _FORMATS.items() if prompt_format.lettered)


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


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, questions: Sequence[Question] = ()
) -> list[list[int]]:
    """Encode prompts without special tokens at the end.

    Args:
        tokenizer: Tokenizer, whose settings are not changed.
        prompts: Texts to encode.
        questions: The question of each prompt, for messages.

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
    for number, (prompt, ids) in enumerate(zip(prompts, encoded["input_ids"], strict=True)):
        if not ids or ids[-1] in refused:
            tokens = tokenizer.convert_ids_to_tokens(list(ids[-3:]))
            whose = f"question {shown(questions[number].id)}: " if questions else ""
            raise ValueError(
                f"{whose}the prompt that ends in {prompt[-12:]!r} is encoded with {tokens} at its end; nothing may "
                "follow the prompt's text; switch off the tokenizer's end-of-sequence token (add_eos_token=False)"
            )
    return [leading + list(ids) for ids in encoded["input_ids"]]


def answer_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], num_choices: int, *, words: Sequence[str] = LETTERS
) -> Tensor:
    """Find the answer tokens of a tokenizer by encoding prompts with the answers appended.

    Encodes every prompt with and without ` A`, ` B`, ... appended; the difference must be one token. Word-level
    tokenizers drop the space, and the difference is then the bare letter. No position is assumed, unlike in
    `encode("A")[1]`, which presumes a beginning-of-sequence token.

    Args:
        tokenizer: Tokenizer, whose settings are not changed.
        prompts: Some prompts of the task, at least one; several reveal whether the tokens depend on the prompt.
        num_choices: Number of letters, from A on.
        words: Words that answer in place of letters, of which the first `num_choices` are taken.

    Returns:
        The id of each letter or word, `[num_choices]` int64.

    Raises:
        ValueError: If one is not one token, two share a token, or it changes between prompts.
    """
    if not prompts:
        raise ValueError("no prompts were given; pass some prompts of the task")
    if not 2 <= num_choices <= len(words):
        raise ValueError(f"num_choices is {num_choices}; 2 to {len(words)} are supported")
    letters = tuple(words[:num_choices])
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
            f"some answers share a token: {tokens}; train or choose a tokenizer whose vocabulary has "
            f"{', '.join(letters)}"
        )
    if tokenizer.unk_token_id in first:
        raise ValueError(
            f"an answer is unknown to the tokenizer: {tokens}; choose one whose vocabulary has {', '.join(letters)}"
        )
    return torch.tensor(first, dtype=torch.int64)


def _answer_id(tokenizer: PreTrainedTokenizerBase, prompt: str, letter: str) -> int:
    if prompt != prompt.rstrip():
        raise ValueError(f"the prompt ends in {prompt[-12:]!r}; end it without white space")
    before, after = _plain_ids(tokenizer, prompt), _plain_ids(tokenizer, f"{prompt} {letter}")
    answer = after[len(before) :]
    if after[: len(before)] != before or len(answer) != 1:
        tokens = tokenizer.convert_ids_to_tokens(after[-4:])
        raise ValueError(
            f"' {letter}' after {prompt[-12:]!r} is not one token: the text then ends in {tokens}; "
            f"use a tokenizer that has the space and {letter}, or {letter}, as one token"
        )
    return answer[0]
