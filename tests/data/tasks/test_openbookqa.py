from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.openbookqa import OpenBookQA

ROW = {
    "id": "7-5",
    "question_stem": "Number 5 is",
    "choices": {"text": ["low", "high", "odd", "even"], "label": ["A", "B", "C", "D"]},
    "answerKey": "C",
}


def test_row():
    found = OpenBookQA().question(ROW, "test-1")
    assert found == Question("7-5", "Number 5 is", ("low", "high", "odd", "even"), 2)


def test_the_configuration_with_the_facts_is_not_the_default():
    assert (OpenBookQA().hub_id, OpenBookQA().default_config) == ("allenai/openbookqa", "main")
