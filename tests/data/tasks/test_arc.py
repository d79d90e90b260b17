import json

import pytest

from bmoe_lightning.data.hub import load_questions
from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.arc import ARC


def row(labels: str, key: str | int, **changes) -> dict:
    texts = ["low", "odd", "even", "prime", "round"][: len(labels)]
    return {
        "id": "M-1",
        "question": "Number 5 is",
        "choices": {"text": texts, "label": list(labels)},
        "answerKey": key,
    } | changes


@pytest.mark.parametrize(
    ("labels", "key", "position"),
    [("123", "2", 1), ("1234", "4", 3), ("ABC", "C", 2), ("ABCDE", "E", 4), ("ABCD", " D", 3), ("1234", 1, 0)],
)
def test_the_answer_is_looked_up_among_the_labels(labels, key, position):
    texts = ("low", "odd", "even", "prime", "round")[: len(labels)]
    assert ARC().question(row(labels, key), "test-1") == Question("M-1", "Number 5 is", texts, position)


@pytest.mark.parametrize(("labels", "key"), [("1234", "B"), ("ABCD", "2"), ("ABC", "D"), ("1234", "0")])
def test_a_key_of_other_labels_is_refused(labels, key):
    with pytest.raises(ValueError, match=f"here: answerKey '{key}' is none of the labels"):
        ARC().read(row(labels, key), "test-1", "here")


def test_numeric_keys_and_three_to_five_choices_in_one_file(tmp_path):
    cases = [("1234", "2"), ("ABC", "A"), ("ABCDE", "E")]
    rows = [row(labels, key, id=f"M-{n}") for n, (labels, key) in enumerate(cases)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = load_questions(tmp_path, "test")
    assert [(len(q.choices), q.answer) for q in questions] == [(4, 1), (3, 0), (5, 4)]


def test_there_is_no_default_configuration():
    assert ARC().default_config is None
    assert ARC().configs == ("ARC-Easy", "ARC-Challenge")
