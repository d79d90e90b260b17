from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.arc import ARC

ROW = {
    "id": "M-1",
    "question": "Number 5 is",
    "choices": {"text": ["low", "odd", "even"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}


def test_row():
    assert ARC().question(ROW, "test-1") == Question("M-1", "Number 5 is", ("low", "odd", "even"), 1)


def test_there_is_no_default_configuration():
    assert ARC().default_config is None
    assert ARC().configs == ("ARC-Easy", "ARC-Challenge")
