from collections import Counter

import pytest

from bmoe_lightning.data.tasks.sciq import SciQ


def row(number: int) -> dict:
    wrong = {f"distractor{place}": f"wrong {place}" for place in (3, 1, 2)}
    return {"question": f"{number} is", **wrong, "correct_answer": "right", "support": ""}


def test_the_right_answer_is_found_wherever_it_stands():
    found = [SciQ().question(row(number), f"train-{number}") for number in range(400)]
    assert all(question.choices[question.answer] == "right" for question in found)
    assert all(sorted(question.choices) == ["right", "wrong 1", "wrong 2", "wrong 3"] for question in found)
    places = Counter(question.answer for question in found)
    assert all(70 < places[place] < 130 for place in range(4)), places  # 100 +- 8.7
    assert len({question.choices for question in found}) == 24


def test_the_order_depends_on_the_question_alone():
    one, again = SciQ().question(row(7), "train-1"), SciQ().question(dict(reversed(row(7).items())), "test-8")
    assert (one.choices, one.answer) == (again.choices, again.answer)
    assert (one.id, again.id) == ("train-1", "test-8")


@pytest.mark.parametrize("column", ["question", "correct_answer", "distractor1", "distractor2", "distractor3"])
def test_a_missing_text_is_refused(column):
    with pytest.raises(ValueError, match=f"^here: {column} is null"):
        SciQ().read({**row(1), column: None}, "train-1", "here")
