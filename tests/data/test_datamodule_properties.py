"""Parts of any questions: disjoint, complete, the same for the same seed; loaders that keep their order."""

from __future__ import annotations

import itertools
import random
import warnings
from functools import cache

import pytest
import torch
from datamodule_cases import module
from hypothesis import given, settings
from hypothesis import strategies as st

from bmoe_lightning.data.batches import SeededShuffle
from bmoe_lightning.data.duplicates import make_disjoint
from bmoe_lightning.data.prompts import encode_prompts
from bmoe_lightning.data.questions import Question, Splits, draw, question_key, split_train
from bmoe_lightning.data.tokenizer import train_word_tokenizer

# The same question in other spellings, and other ones.
TEXTS = ("Which?", " which ", "WHICH ?!", "Which one?", "5 - 3", "5 + 3", "\uff15 - 3", "\u05d0?", "a", "b", "c", "d")
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def parts(draw, **sizes):
    """Questions with ids that say where they stand."""
    texts = draw(st.lists(st.sampled_from(TEXTS), **sizes))
    name = draw(st.sampled_from("abc"))
    counts = draw(st.lists(st.integers(2, 4), min_size=len(texts), max_size=len(texts)))
    return tuple(
        Question(f"{name}{number}", text, tuple("wxyz"[:count]), number % count)
        for number, (text, count) in enumerate(zip(texts, counts, strict=True))
    )


def keys(questions):
    return {question_key(question) for question in questions}


def is_in_order(some, questions):
    """Whether questions are some of others, in their order."""
    rest = iter(questions)
    return all(question in rest for question in some)


@given(parts(max_size=8), parts(max_size=8), parts(max_size=8), st.booleans())
@settings(max_examples=50)
def test_no_text_is_in_two_parts_and_none_is_lost(train, calibration, test, again):
    given_parts = Splits(train, calibration, test, calibration_in_train=again)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = make_disjoint(given_parts)
    assert found.test == test
    assert keys(found.train) | keys(found.calibration) | keys(test) == keys((*train, *calibration, *test))
    assert is_in_order(found.train, train)
    assert is_in_order(found.calibration, calibration)
    assert not keys(test) & keys((*found.train, *found.calibration))
    assert again or not keys(found.calibration) & keys(found.train)
    left_out = len(train) - len(found.train) + len(calibration) - len(found.calibration)
    assert len(told) == (left_out > 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_disjoint(found) == found


@given(parts(max_size=12), st.floats(0.01, 0.99), SEEDS)
@settings(max_examples=50)
def test_a_seed_sets_the_same_questions_aside(questions, fraction, seed):
    before = random.getstate()
    try:
        fit, calibration = split_train(questions, fraction, seed=seed)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "leaves one side empty" in refusal
        return
    assert random.getstate() == before
    assert (fit, calibration) == split_train(questions, fraction, seed=seed)
    assert not keys(fit) & keys(calibration)
    assert sorted((*fit, *calibration), key=questions.index) == list(questions)
    assert is_in_order(fit, questions)
    assert is_in_order(calibration, questions)
    assert 0 < len(calibration) <= round(fraction * len(questions))


@given(parts(max_size=12), st.none() | st.integers(1, 15), SEEDS)
def test_a_limit_takes_so_many_in_their_order(questions, limit, seed):
    found = draw(questions, limit, seed=seed)
    assert len(found) == min(len(questions), limit or len(questions))
    assert is_in_order(found, questions)
    assert found == draw(questions, limit, seed=seed)


@given(st.integers(0, 40), SEEDS, st.integers(0, 5))
def test_an_epoch_has_every_item_once_and_its_own_order(size, seed, epoch):
    sampler, other = SeededShuffle(size, seed), SeededShuffle(size, seed)
    for _ in range(epoch):
        next(iter(other), None)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(size))
    assert order == list(other)


@cache
def tokenizer():
    return train_word_tokenizer([*TEXTS, "Answer: w x y z Choices: A. B. C. D."], max_vocab=200)


@given(
    parts(min_size=1, max_size=10),
    parts(min_size=1, max_size=10),
    parts(min_size=1, max_size=10),
    st.fixed_dictionaries(
        {
            "batch_size": st.integers(1, 5),
            "eval_batch_size": st.none() | st.integers(1, 5),
            "limit": st.none() | st.integers(1, 4),
            "seed": SEEDS,
            "prompt": st.sampled_from(["letters", "instruction", "cloze"]),
            "padding_side": st.sampled_from(["left", "right"]),
        }
    ),
)
def test_loaders_give_every_question_once_as_it_was_asked(train, calibration, test, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disjoint = make_disjoint(Splits(train, calibration, test))
        if not (disjoint.train and disjoint.calibration):
            with pytest.raises(ValueError, match="split is empty, or all its questions are asked in a later split"):
                module(tokenizer(), train, calibration, test, **options)
            return
        data, same = (module(tokenizer(), train, calibration, test, **options) for _ in range(2))
    for name, part in (
        ("curvature", "train"),
        ("calibration", "calibration"),
        ("val", "calibration"),
        ("test", "test"),
    ):
        batches = list(getattr(data, f"{name}_dataloader")())
        assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(len(data.questions(part))))
        for batch in batches:
            check_batch(batch, data, part)
    orders = [[batch["index"].tolist() for _ in range(2) for batch in one.train_dataloader()] for one in (data, same)]
    assert orders[0] == orders[1]
    assert sorted(itertools.chain(*orders[0])) == sorted([*range(len(data.questions("train")))] * 2)


def check_batch(batch, data, part):
    """The rows of a batch are their questions, whatever their padding."""
    for row, index in enumerate(batch["index"].tolist()):
        question = data.questions(part)[index]
        assert batch["label"][row] == question.answer
        assert batch["choice_mask"][row].tolist() == [n < len(question.choices) for n in range(data.num_choices)]
        prompt = data.prompt_format.render(question)
        rows = batch["input_ids"][row].view(-1, batch["input_ids"].shape[-1])
        masks = batch["attention_mask"][row].view(rows.shape).bool()
        expected = [prompt]
        if data.prompt_format.cloze:
            expected = [f"{prompt} {answer}" for answer in data.prompt_format.answers(question)]
        found = [ids[mask].tolist() for ids, mask in zip(rows, masks, strict=True) if mask.any()]
        assert found == encode_prompts(data.tokenizer, expected)
