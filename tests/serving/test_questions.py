"""Questions from mappings."""

from __future__ import annotations

import pytest

from bmoe_lightning.data import Question
from bmoe_lightning.serving.questions import as_questions, question_of

ROW = {"question": "is it ?", "choices": ["yes", "no"]}


def test_questions_have_ids_answers_and_passages():
    given = Question("a", "is it ?", ("yes", "no"), 1)
    rows = [
        given,
        ROW,
        {**ROW, "id": 7, "answer": 1, "passage": "It is."},
        {**ROW, "id": 0, "answer": None, "other": 3},
    ]
    found = list(as_questions(iter(rows)))
    assert found == [
        given,
        Question("1", "is it ?", ("yes", "no"), 0),
        Question("7", "is it ?", ("yes", "no"), 1, "It is."),
        Question("0", "is it ?", ("yes", "no"), 0),
    ]


def test_they_are_read_as_they_are_asked_for():
    found = as_questions([ROW, {}])
    assert next(found).id == "0"
    with pytest.raises(ValueError, match=r"question 1: question missing; the columns found are \[\]"):
        next(found)


@pytest.mark.parametrize("change", [{"id": [1]}, {"id": False}, {"id": ""}, {"passage": 3}, {"choices": {"text": []}}])
def test_errors_begin_with_the_place(change):
    with pytest.raises(ValueError, match=r"^file\.jsonl, line 3: "):
        question_of({**ROW, **change}, "0", "file.jsonl, line 3")
