import datasets
import pytest

from bmoe_lightning.data.hub import load_questions
from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.mmlu import MMLU


def row(number: int, subject: str) -> dict:
    return {"question": f"{number} is", "subject": subject, "choices": ["low", "odd", "high", "even"], "answer": 3}


SPLITS = {
    "auxiliary_train": [row(1, ""), row(2, "")],
    "dev": [row(3, "astronomy")],
    "validation": [row(4, "astronomy"), row(5, "anatomy")],
    "test": [row(6, "astronomy"), row(7, "anatomy"), row(8, "virology"), row(9, "anatomy")],
}


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def load_dataset(*arguments, **_):
        calls.append(arguments)
        # On the hub the answer is a class label, whose rows hold integers.
        features = datasets.Features(
            {
                "question": datasets.Value("string"),
                "subject": datasets.Value("string"),
                "choices": datasets.List(datasets.Value("string")),
                "answer": datasets.ClassLabel(names=list("ABCD")),
            }
        )
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows, features=features) for split, rows in SPLITS.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_row():
    found = MMLU().question(row(7, "anatomy"), "test-2")
    assert found == Question("test-2", "7 is", ("low", "odd", "high", "even"), 3)


@pytest.mark.parametrize("answer", [4, -1, "D", True, None])
def test_an_answer_that_is_no_position_is_refused(answer):
    with pytest.raises(ValueError, match=r"^here: answer"):
        MMLU().read({**row(7, "anatomy"), "answer": answer}, "test-2", "here")


def test_the_few_shot_split_is_neither_trained_on_nor_validated_on(hub):
    read = {split: load_questions("cais/mmlu", split) for split in ("train", "validation", "test")}
    texts = {split: [question.question for question in questions] for split, questions in read.items()}
    assert texts == {
        "train": ["1 is", "2 is"],
        "validation": ["4 is", "5 is"],
        "test": ["6 is", "7 is", "8 is", "9 is"],
    }
    assert set(hub) == {("cais/mmlu", "all")}


def test_named_subjects_are_read_and_training_rows_have_none(hub):
    task = MMLU(subjects=["anatomy", "virology"])
    assert task == MMLU(subjects=("anatomy", "virology"))
    assert [q.question for q in load_questions("cais/mmlu", "test", task=task)] == ["7 is", "8 is", "9 is"]
    assert len(load_questions("cais/mmlu", "train", task=task)) == 2
    assert hub[-1] == ("cais/mmlu", "all")


def test_a_subject_by_its_own_configuration(hub):
    load_questions("cais/mmlu:anatomy", "test")
    assert hub == [("cais/mmlu", "anatomy")]


def test_unknown_subjects_are_refused_with_those_there_are(hub):
    with pytest.raises(ValueError, match="no row has the subject 'botany'; the subjects are anatomy, astronomy, vir"):
        load_questions("cais/mmlu", "test", task=MMLU(subjects=("anatomy", "botany")))
    with pytest.raises(TypeError, match=r"subjects must be a tuple of names, found 'anatomy'; write \('anatomy',\)"):
        MMLU(subjects="anatomy")
    rows = iter([("line 1", {"question": "?"})])
    with pytest.raises(ValueError, match="line 1: subject must be a text, found null"):
        list(MMLU(subjects=("anatomy",)).select(rows))
