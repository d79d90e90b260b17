import logging
import warnings

import pytest

from bmoe_lightning.data.duplicates import make_disjoint
from bmoe_lightning.data.questions import Question, Splits


def make(number: int, text: str = "", choices: tuple[str, ...] = ()) -> Question:
    return Question(f"item-{number}", text or f"What follows {number}?", choices or (f"a{number}", f"b{number}"), 0)


def test_nothing_is_said_where_nothing_is_left_out():
    splits = Splits((make(1), make(1)), (make(2),), (make(3),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_disjoint(splits) == splits


def test_one_sentence_says_what_was_left_out_of_train_and_of_calibration(caplog):
    train = tuple(make(i) for i in range(10))
    again = make(100, "WHAT follows  3", ("B3", "a3 "))  # the choices in another order
    other = make(101, "What follows 7?", ("x", "y"))
    calibration = (make(20), make(21, "what follows 5"), make(22, "what follows 100?"))
    test = (again, other, make(102, "What follows 100"))
    expected = (
        "3 of 10 train questions are also asked in the calibration or test split (1 with the same choices), and 1 of 3 "
        "calibration questions are also asked in the test split (0 with the same choices); they were left out"
    )
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="also asked") as caught:
        found = make_disjoint(Splits(train, calibration, test))
    assert [str(warning.message) for warning in caught] == [expected]
    assert caplog.messages == [expected]
    assert [q.id for q in found.train] == [f"item-{i}" for i in range(10) if i not in (3, 5, 7)]
    assert found.calibration == calibration[:2]
    assert found.test == test


def test_a_question_that_leaves_calibration_still_leaves_train():
    with pytest.warns(UserWarning, match="1 of 1 train .* in the test split .*, and 1 of 1 calibration"):
        found = make_disjoint(Splits((make(1),), (make(1),), (make(1),)))
    assert (found.train, found.calibration, found.test) == ((), (), (make(1),))


def test_calibration_questions_that_are_trained_on_by_intent_stay():
    train = tuple(make(i) for i in range(5))
    splits = Splits(train, train[:2], (make(9),), calibration_in_train=True)
    assert make_disjoint(splits) == splits
    with pytest.warns(UserWarning, match="1 of 5 train questions are also asked in the test split"):
        assert len(make_disjoint(Splits(train, train[:2], (train[4],), calibration_in_train=True)).train) == 4


def test_the_same_question_about_another_passage_is_no_duplicate():
    one, two = (
        Question("q", "Is it so?", ("False", "True"), 0, passage) for passage in ("Corks float.", "Nails sink.")
    )
    splits = Splits((one,), (), (two,))
    assert make_disjoint(splits) == splits
