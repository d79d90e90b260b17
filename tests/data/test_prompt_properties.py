"""Prompts of any questions: within the maximum length, with all that must not be cut, or refused by question."""

from __future__ import annotations

from functools import cache

import pytest
from data_strategies import questions, texts
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizer_cases import byte_level

from bmoe_lightning.data.cloze import fit_cloze, indistinct
from bmoe_lightning.data.prompts import (
    LETTERED_PROMPT_NAMES,
    PROMPT_NAMES,
    answer_token_ids,
    encode_prompts,
    get_prompt_format,
)
from bmoe_lightning.data.questions import Question, question_key
from bmoe_lightning.data.tokenizer import train_word_tokenizer
from bmoe_lightning.data.truncation import fit_prompts
from bmoe_lightning.utils.messages import shown

CLOZE = get_prompt_format("cloze")
CORPUS = ["Answer: A B C D E F x word", " True False yes no yesterday", "Choices: A. x B. x", "Answer: A word"] * 3


@cache
def tokenizer_of(kind):
    if kind == "words":
        return train_word_tokenizer(CORPUS, max_vocab=60)
    return byte_level(CORPUS, bos=kind == "framed bytes", eos=kind == "framed bytes")


tokenizers = st.sampled_from(["words", "bytes", "framed bytes"]).map(tokenizer_of)
lengths = st.integers(4, 60)


def several(**options):
    return st.lists(questions(**options), min_size=1, max_size=3)


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def shortened(form, question):
    """The prompts of a question with all of its words that may be cut, and with fewer and fewer of them."""
    text = question.question if question.passage is None else question.passage
    words = text.split()
    for count in range(len(words), 0 if question.passage is None else -1, -1):
        if question.passage is None:
            yield form.compose(question, None, " ".join(words[len(words) - count :]))
        else:
            kept = words[:count] if form.before_passage is not None else words[len(words) - count :]
            yield form.compose(question, " ".join(kept) or None, question.question)


def refused_question(error, asked):
    """The question that a refusal names."""
    named = [question for question in asked if str(error).startswith(f"question {shown(question.id)}: ")]
    assert named, str(error)
    assert str(error).isprintable()
    return named


@given(
    tokenizers,
    st.sampled_from(LETTERED_PROMPT_NAMES).map(get_prompt_format),
    several(with_long=False) | several(with_long=False, passage=True),
    lengths,
)
def test_a_prompt_loses_no_more_than_it_must(tokenizer, form, asked, max_length):
    try:
        rows, cut = fit_prompts(tokenizer, form, asked, max_length)
    except ValueError as error:
        # Without all that may be cut one of them is too long.
        shortest = [[*shortened(form, question)][-1] for question in refused_question(error, asked)]
        assert max(map(len, encode_prompts(tokenizer, shortest))) > max_length
        return
    whole = encode_prompts(tokenizer, [form.render(question) for question in asked])
    assert cut == sum(len(ids) > max_length for ids in whole)
    for question, row, ids in zip(asked, rows, whole, strict=True):
        assert len(row) <= max_length
        if len(ids) <= max_length:
            assert row == ids
        else:
            assert row in encode_prompts(tokenizer, [*shortened(form, question)])


@given(tokenizers, questions(with_long=False), st.integers(100, 200))
def test_a_very_long_question_is_cut(tokenizer, question, max_length):
    question = Question("long", "word " * 4000 + "x", ("a", question.id), 0)
    try:
        (row,), cut = fit_prompts(tokenizer, get_prompt_format("letters"), [question], max_length)
    except ValueError as error:
        refused_question(error, [question])
        return
    assert cut == 1
    assert max_length - 3 <= len(row) <= max_length


WORDS = ("A", "B", "C", "True", "False", "yes", "yesterday", "no", "word", "zebra", "x", "", "\u05d0")


@given(tokenizers, several(with_long=False), st.lists(st.sampled_from(WORDS), min_size=2, max_size=4, unique=True))
def test_answers_are_one_token_each_after_every_prompt_or_refused(tokenizer, asked, words):
    prompts = [get_prompt_format("letters").render(question) for question in asked]
    after = [[plain(tokenizer, f"{prompt} {word}") for word in words] for prompt in prompts]
    expected = [ids[-1] for ids in after[0] if ids]
    valid = len(set(expected)) == len(words) and tokenizer.unk_token_id not in expected
    valid &= all(
        ids == [*plain(tokenizer, prompt), token]
        for prompt, row in zip(prompts, after, strict=True)
        for ids, token in zip(row, expected, strict=True)
    )
    if not valid:
        with pytest.raises(ValueError, match="token"):
            answer_token_ids(tokenizer, prompts, len(words), words=words)
        return
    assert answer_token_ids(tokenizer, prompts, len(words), words=words).tolist() == expected


@st.composite
def nested_choices(draw):
    """Questions with choices of which one begins another."""
    asked = draw(questions(with_long=False))
    endings = draw(st.lists(st.sampled_from(["", "x", " x", " word", "s", "</s>", " </s>", "\u0301"]), max_size=3))
    choices = [asked.choices[0] + ending for ending in endings]
    return Question(asked.id, asked.question, (*asked.choices, *choices), asked.answer)


@given(tokenizers, st.lists(nested_choices(), min_size=1, max_size=3), lengths, st.sampled_from(["sum", "bytes"]))
# The question of a choice that is a special token was not named.
@example(tokenizer_of("bytes"), [Question("q", "x", ("a", "x</s>"), 0)], 60, "sum")
def test_the_tokens_of_a_prompt_and_its_choice_are_those_of_the_text(tokenizer, asked, max_length, normalise):
    try:
        items, cut = fit_cloze(tokenizer, CLOZE, asked, max_length, normalise)
    except ValueError as error:
        refused_question(error, asked)
        return
    was_cut = 0
    for index, (question, item) in enumerate(zip(asked, items, strict=True)):
        answers = CLOZE.answers(question)
        wholes = encode_prompts(tokenizer, [f"{CLOZE.render(question)} {answer}" for answer in answers])
        assert (item.index, item.label, item.num_choices) == (index, question.answer, len(question.choices))
        assert item.token_ids
        assert all(item.choices)
        assert all(len(item.token_ids) + len(choice) <= max_length for choice in item.choices)
        assert item.lengths == tuple(1.0 if normalise == "sum" else len(answer.encode()) for answer in answers)
        assert indistinct([item]) == (len(set(map(tuple, wholes))) < len(wholes))
        if max(map(len, wholes)) > max_length:
            was_cut += 1
        else:
            assert [[*item.token_ids, *choice] for choice in item.choices] == wholes
    assert cut == was_cut


@given(questions(with_long=False), st.sampled_from(PROMPT_NAMES).map(get_prompt_format))
def test_a_prompt_holds_the_question_and_every_choice(question, form):
    if not form.applies(question):
        with pytest.raises(ValueError, match="use a prompt format with letters"):
            form.answers(question)
        return
    prompt = form.render(question)
    assert prompt == prompt.rstrip()
    assert question.question.strip() in prompt
    assert len(form.answers(question)) == len(question.choices)
    if form.lettered:
        assert all(choice.strip() in prompt for choice in question.choices)


@given(texts(with_long=False), texts(with_long=False))
def test_spaces_and_closing_punctuation_make_no_other_question(one, other):
    def key(text):
        return question_key(Question("q", text, ("a", "b"), 0))

    spaced = one.replace(" ", " \u2003")
    assert key(f"\n {spaced} ?!") == key(one)
    assert (key(one) == key(other)) == (key(other) == key(one))
    assert key(one) != key(f"{one} y")
