import json

import pytest

from bmoe_lightning.data.hub import load_questions
from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.splits import load_splits
from bmoe_lightning.data.tasks.medmcqa import MedMCQA


def row(number: int, subject: str = "Medicine", cop: int = 2) -> dict:
    choices = {"opa": "one", "opb": "two", "opc": "three", "opd": "four"}
    return {"id": f"q{number}", "question": f"{number} is", **choices, "cop": cop, "subject_name": subject}


def folder(path, **splits):
    path.mkdir()
    for name, rows in splits.items():
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def test_row():
    found = MedMCQA().question(row(7), "test-2")
    assert found == Question("q7", "7 is", ("one", "two", "three", "four"), 2)


@pytest.mark.parametrize("cop", [4, -1, "3", True, None])
def test_an_answer_that_counts_from_one_or_is_hidden_is_refused(cop):
    with pytest.raises(ValueError, match=r"^here: cop"):
        MedMCQA().read(row(7, cop=cop), "test-2", "here")


def test_the_unlabelled_test_split_is_never_read(tmp_path):
    train, public = [row(number) for number in range(10)], [row(number) for number in range(20, 24)]
    data = folder(tmp_path / "medmcqa", train=train, validation=public, test=[row(30, cop=-1)])
    splits = load_splits(data, "holdout")
    assert sorted(question.id for question in splits.test) == ["q20", "q21", "q22", "q23"]
    assert {question.id for question in (*splits.train, *splits.calibration)} == {f"q{number}" for number in range(10)}
    assert len(splits.calibration) == 2


def test_named_subjects_are_read(tmp_path):
    rows = [row(1), row(2, "Anatomy"), row(3, "Surgery"), row(4)]
    data = folder(tmp_path / "medmcqa", train=rows, validation=rows[:1])
    found = load_questions(data, "train", task=MedMCQA(subjects=["Medicine", "Surgery"]))
    assert [question.id for question in found] == ["q1", "q3", "q4"]
    with pytest.raises(ValueError, match="no row has the subject 'Law'; the subjects are Anatomy, Medicine, Surgery"):
        load_questions(data, "train", task=MedMCQA(subjects=("Law",)))
    rows = iter([("line 1", {"question": "?", "subject": "Medicine"})])
    with pytest.raises(ValueError, match="line 1: subject_name must be a text, found null"):
        list(MedMCQA(subjects=("Medicine",)).select(rows))
