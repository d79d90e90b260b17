import datasets
import pytest

from bmoe_lightning.data.hub import load_questions
from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.tasks.boolq import BoolQ

ROW = {"question": "do corks float", "passage": "Cork is light."}


@pytest.mark.parametrize(
    ("column", "value", "right"),
    [("answer", True, "True"), ("answer", False, "False"), ("label", 1, "True"), ("label", 0, "False")],
)
def test_true_is_the_answer_true(column, value, right):
    found = BoolQ().question({**ROW, "idx": 3, column: value}, "test-4")
    assert found == Question("test-4", "do corks float", ("False", "True"), int(value), "Cork is light.")
    assert found.choices[found.answer] == right


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"answer \(or label\) missing"),
        ({"answer": 1}, "answer must be true or false, found the number 1"),
        ({"answer": "true"}, "answer must be true or false"),
        ({"label": -1}, "label must be an integer from 0 to 1, found the number -1"),
        ({"label": True}, "label must be an integer from 0 to 1, found the boolean True"),
        ({"answer": None, "label": None}, r"answer \(or label\) missing"),
    ],
)
def test_rows_without_an_answer_are_refused(columns, message):
    with pytest.raises(ValueError, match=f"^here: {message}"):
        BoolQ().read({**ROW, **columns}, "test-4", "here")


def test_superglue_on_the_hub_reports_its_validation_split(monkeypatch):
    calls = []

    def load_dataset(*arguments, **_):
        calls.append(arguments)
        rows = {"train": 1, "validation": 0, "test": -1}
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list([{**ROW, "idx": 0, "label": label}]) for split, label in rows.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_questions("aps/super_glue:boolq", "train")[0].answer == 1
    assert load_questions("aps/super_glue:boolq", "test", task="boolq")[0].answer == 0
    assert calls == [("aps/super_glue", "boolq")] * 2


def test_a_folder_of_parquet_files(tmp_path):
    for split, answers in (("train", (True, False)), ("validation", (False,))):
        rows = [{**ROW, "answer": answer} for answer in answers]
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    assert [q.answer for q in load_questions(tmp_path, "train")] == [1, 0]
    assert [q.answer for q in load_questions(tmp_path, "test")] == [0]
