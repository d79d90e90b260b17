import random
from collections import Counter

import pytest

from bmoe_lightning.data.questions import (
    LETTERS,
    Question,
    Splits,
    draw,
    has_ambiguous_answer,
    question_key,
    split_train,
)


def make(number: int, *, answer: int = 0, text: str | None = None, choices: int = 4) -> Question:
    return Question(
        id=f"item-{number}",
        question=text or f"What follows {number}?",
        choices=tuple(f"choice {i} of {number}" for i in range(choices)),
        answer=answer,
    )


def test_a_list_of_choices_becomes_a_tuple_and_the_question_is_hashable():
    question = Question("a", "Why?", ["x", "y"], 1)
    assert question.choices == ("x", "y")
    assert len({question, Question("a", "Why?", ("x", "y"), 1)}) == 1


def test_letters():
    assert LETTERS[:5] == "ABCDE"
    assert len(LETTERS) == 26


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"id": " "}, ValueError, "id is empty"),
        ({"question": "\n"}, ValueError, "question is empty"),
        ({"choices": ("x", "")}, ValueError, "choice B is empty"),
        ({"choices": ("x",), "answer": 0}, ValueError, "has 1 choices"),
        ({"choices": tuple(f"c{i}" for i in range(27))}, ValueError, "has 27 choices"),
        ({"answer": 2}, ValueError, "answer 2 is outside its 2 choices"),
        ({"answer": -1}, ValueError, "answer -1 is outside"),
        ({"answer": True}, TypeError, "answer must be an integer position counted from 0, found the "),
        ({"answer": "A"}, TypeError, "answer must be an integer position counted from 0, found the "),
        ({"choices": "xy"}, TypeError, "choices must be a list of texts, found the text 'xy'"),
        ({"choices": None}, TypeError, "choices must be a list of texts, found null"),
        ({"choices": ("x", 3)}, TypeError, "choice B must be a text, found the number 3"),
        ({"question": {"stem": "?"}}, TypeError, r"question must be a text, found the object \{'stem': '\?'\}"),
        ({"passage": 3}, TypeError, "passage must be a text, found the number 3"),
        ({"passage": " "}, ValueError, "passage is empty"),
        ({"question": "half \ud800"}, ValueError, "question is not valid Unicode"),
        ({"id": "\udfff"}, ValueError, "id is not valid Unicode"),
    ],
)
def test_malformed_questions_are_refused_by_name(changes, error, message):
    fields = {"id": "item-7", "question": "Why?", "choices": ("x", "y"), "answer": 0} | changes
    with pytest.raises(error, match=message) as caught:
        Question(**fields)
    assert repr(fields["id"]) in str(caught.value)


def test_key_levels_spelling_but_not_meaning():
    def key(text):
        return question_key(make(0, text=text))

    assert key("Pollution  is:") == key("pollution is") == key(" POLLUTION\nis ?")
    assert key("\uff37hy?") == key("Why?")  # a full-width W
    assert key("5 - 3?") != key("5 + 3?")
    assert key("Is it not?") != key("Is it?")
    assert key("???") != ""


def test_the_same_question_about_another_passage_is_another_one():
    def key(passage):
        return question_key(Question("q", "Which is true?", ("x", "y"), 0, passage))

    assert key("Corks float. ") == key("corks\nfloat")
    assert key("Corks float.") != key("Nails sink.") != key(None)
    assert key(None) == question_key(make(0, text="Which is true?"))


def test_split_has_the_asked_size_and_loses_nothing():
    questions = [make(i, answer=i % 4) for i in range(100)]
    fit, calibration = split_train(questions, 0.2, seed=3)
    assert len(calibration) == 20
    assert sorted((*fit, *calibration), key=lambda q: q.id) == sorted(questions, key=lambda q: q.id)


def test_split_is_stratified_by_the_answer():
    questions = [make(i, answer=0 if i < 150 else 1 if i < 190 else 3) for i in range(200)]
    fit, calibration = split_train(questions, 0.2, seed=1)
    assert Counter(q.answer for q in calibration) == {0: 30, 1: 8, 3: 2}
    assert Counter(q.answer for q in fit) == {0: 120, 1: 32, 3: 8}


def test_split_follows_the_seed_and_is_no_slice_of_the_file():
    questions = [make(i, answer=i % 4) for i in range(100)]
    once, again, other = (split_train(questions, seed=seed)[1] for seed in (5, 5, 6))
    assert once == again
    assert once != other
    assert once not in (tuple(questions[-20:]), tuple(questions[:20]))


def test_split_leaves_the_global_random_state_alone():
    random.seed(11)
    before = random.getstate()
    split_train([make(i) for i in range(10)])
    draw([make(i) for i in range(10)], 3)
    assert random.getstate() == before


def test_split_works_where_every_stratum_by_itself_rounds_to_nothing():
    fit, calibration = split_train([make(i, answer=i) for i in range(4)], 0.25)
    assert (len(fit), len(calibration)) == (3, 1)


@pytest.mark.parametrize("seed", range(8))
def test_equal_texts_stay_together(seed):
    questions = [make(i, answer=i % 4, text=f"{'What IS' if i % 3 else 'what  is'} {i // 5}") for i in range(60)]
    fit, calibration = split_train(questions, 0.3, seed=seed)
    assert calibration
    assert not {question_key(q) for q in fit} & {question_key(q) for q in calibration}
    assert len(fit) + len(calibration) == 60


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 1.5])
def test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        split_train([make(i) for i in range(10)], fraction)


@pytest.mark.parametrize(
    "questions",
    [[], [make(0)], [make(i) for i in range(2)], [make(i, text="Which is true?") for i in range(20)]],
    ids=["none", "one", "rounds-to-none", "all-the-same-text"],
)
def test_split_with_an_empty_side_is_refused(questions):
    with pytest.raises(ValueError, match="leaves one side empty"):
        split_train(questions, 0.2)


def test_draw_is_seeded_ordered_and_bounded():
    questions = tuple(make(i) for i in range(50))
    drawn = draw(questions, 10, seed=2)
    assert drawn == draw(questions, 10, seed=2) != draw(questions, 10, seed=3)
    assert drawn != questions[:10]
    assert list(drawn) == [q for q in questions if q in set(drawn)]
    assert len(drawn) == 10
    assert draw(questions, None) == draw(questions, 50) == draw(questions, 99) == questions
    with pytest.raises(ValueError, match="at least 1"):
        draw(questions, 0)


def test_splits_hold_their_parts():
    splits = Splits(train=(make(1),), calibration=(make(2),), test=(make(3),))
    assert [part[0].id for part in (splits.train, splits.calibration, splits.test)] == ["item-1", "item-2", "item-3"]


@pytest.mark.parametrize("blank", ["\u200b", "\0", " \ufeff\t", "\u00ad"])
def test_a_text_that_shows_nothing_is_empty(blank):
    with pytest.raises(ValueError, match="choice B is empty"):
        Question("q", "?", ("a", blank), 0)


def test_choices_that_are_equal_when_normalised_are_ambiguous():
    assert has_ambiguous_answer(Question("q", "?", ("caf\u00e9", "cafe\u0301"), 0))
    assert not has_ambiguous_answer(Question("q", "?", ("caf\u00e9", "cafe"), 0))
