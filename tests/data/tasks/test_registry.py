import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from bmoe_lightning.data import MultipleChoiceDataModule, train_word_tokenizer
from bmoe_lightning.data.tasks import registry as R
from bmoe_lightning.data.tasks.arc import ARC
from bmoe_lightning.data.tasks.contract import check_task


@dataclass(frozen=True)
class Concept(ARC):
    name: str = "concept"
    hub_id: str = "someone/concept"
    columns: tuple[str, ...] = ("question", "question_concept", "choices", "answerKey")


def test_built_in_names_and_classes_agree():
    assert R.built_in_task_names()
    for name in R.built_in_task_names():
        assert R.get_task(name).name == name
    assert R.get_task("arc") == ARC()


def test_names_are_listed_without_torch():
    code = "import sys; from bmoe_lightning.data import task_names; task_names(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_is_no_task_is_refused():
    with pytest.raises(ValueError, match="unknown task 'ark', did you mean 'arc'"):
        R.get_task("ark")
    with pytest.raises(TypeError, match=r"a task is a name or an instance of bmoe_lightning\..*:Task, got 3"):
        R.get_task(3)


def test_recognised_by_the_most_columns():
    assert R.recognise_task({"id", "question", "choices", "answerKey"}).name == "arc"
    assert R.recognise_task(["id", "question_stem", "choices", "answerKey", "fact1"]).name == "openbookqa"
    assert R.recognise_task(["question", "passage", "answer"]).name == "boolq"
    assert R.recognise_task(["question", "passage", "idx", "label"]).name == "boolq"
    assert R.recognise_task(["question", "subject", "choices", "answer"]).name == "mmlu"
    assert R.recognise_task(["qID", "sentence", "option1", "option2", "answer"]).name == "winogrande"
    with pytest.raises(
        ValueError,
        match=r"the columns \['a', 'b'\] fit none of openbookqa, arc, winogrande, boolq, mmlu, medmcqa, sc",
    ):
        R.recognise_task(["b", "a"])
    with pytest.raises(ValueError, match=r"\(openbookqa needs question_stem too, arc needs question too\); name"):
        R.recognise_task(["id", "answerKey", "choices"])
    with pytest.raises(ValueError, match="fit the tasks openbookqa, arc; name the task"):
        R.recognise_task(["question", "question_stem", "answerKey"])


THEIRS = """
from dataclasses import dataclass
from bmoe_lightning.data import Question, Task
from bmoe_lightning.data.tasks.columns import bool_column, text_column

@dataclass(frozen=True)
class YesNo(Task):
    name: str = "yes_no"
    label: str = "Yes or no"
    url: str = "https://example.org"
    columns: tuple[str, ...] = ("question", "passage", "answer")
    validation_splits: tuple[str, ...] = ()
    test_splits: tuple[str, ...] = ("validation",)

    def question(self, row, row_id):
        answer = int(bool_column(row, "answer"))
        return Question(row_id, text_column(row, "question"), ("no", "yes"), answer, text_column(row, "passage"))
"""


def test_a_data_set_of_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "theirs_1.py").write_text(THEIRS)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{R.ENTRY_POINT_GROUP}]\nyes_no = theirs_1:YesNo\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert R.task_names() == (*R.built_in_task_names(), "yes_no")
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 20), ("validation", 6)):
        rows = [{"question": f"{split} {i}?", "passage": f"About {i}.", "answer": i % 3 == 0} for i in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_word_tokenizer(["Answer: A B About Choices"], max_vocab=100)
    module = MultipleChoiceDataModule(str(data), tokenizer, prompt="letters")  # recognised by its columns
    module.setup()
    assert [len(module.questions(part)) for part in ("train", "calibration", "test")] == [16, 4, 6]
    first = module.questions("test")[0]
    assert (first.id, first.passage, first.choices[first.answer]) == ("test-1", "About 0.", "yes")
    assert module.num_choices == 2
    check_task("yes_no", rows)


def test_a_registered_task_with_more_columns_wins(monkeypatch):
    monkeypatch.setattr(R._TASKS, "_registered", {})
    R.register_task(Concept)
    assert R.recognise_task(["question", "question_concept", "choices", "answerKey"]) == Concept()
    assert R.task_names()[-1] == "concept"
    assert R.task_of_hub_id("someone/concept") == Concept()
    assert R.task_of_hub_id("someone/else") is None
