"""The generated data sets: sizes, answers, and no fact in two splits."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from recipes.paper.generated import GENERATED_SETS, WORLD, generated_set

by_name = pytest.mark.parametrize("entry", GENERATED_SETS, ids=lambda entry: entry.name)
FACTS = {fact.identifier: fact for fact in WORLD.facts}


def facts_of(questions):
    return {question.id for question in questions}


def test_no_fact_is_trained_on_in_one_form_and_asked_for_in_another():
    splits = [entry.splits() for entry in GENERATED_SETS]
    for part, other in combinations(("train", "calibration", "test"), 2):
        first = set().union(*(facts_of(getattr(split, part)) for split in splits))
        second = set().union(*(facts_of(getattr(split, other)) for split in splits))
        assert first
        assert not first & second


@by_name
def test_the_answer_is_the_value_of_the_fact(entry):
    for part in vars(entry.splits()).values():
        for question in part if isinstance(part, tuple) else ():
            fact = FACTS[question.id]
            if entry.name == "judged":
                claimed = question.question.removeprefix(f"{fact.stem} ")
                assert (claimed == fact.value) == (question.choices[question.answer] == "yes")
            else:
                assert question.choices[question.answer] == fact.value
                assert fact.usual in question.choices


@by_name
def test_every_answer_is_right_about_as_often(entry):
    questions = [question for part in ("train", "calibration", "test") for question in getattr(entry.splits(), part)]
    choices = len(questions[0].choices)
    for position in range(choices):
        share = sum(question.answer == position for question in questions) / len(questions)
        assert abs(share - 1 / choices) < 0.08


@by_name
def test_is_the_same_every_time_and_another_for_another_world(entry):
    assert entry.splits() == entry.splits()
    assert entry.splits(replace(WORLD, seed=1)) != entry.splits()


def test_what_the_names_promise():
    exceptions = [FACTS[question.id].is_exception for question in generated_set("exceptions").splits().test]
    assert sum(exceptions) * 3 == len(exceptions)
    assert not any(FACTS[question.id].is_exception for question in generated_set("regular").splits().test)
    assert len(generated_set("pairs_small").splits().train) == 64
    assert len(generated_set("pairs").splits().train) == 259
    assert len(generated_set("pairs_small").splits().test) == len(generated_set("pairs").splits().test)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'recal'; choose from recall, exceptions"):
        generated_set("recal")
