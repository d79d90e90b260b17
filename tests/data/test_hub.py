import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
from unprivileged import unprivileged_folder

from bmoe_lightning.data.files import DataUnavailableError
from bmoe_lightning.data.hub import is_hub_id, load_questions
from bmoe_lightning.data.tasks import registry
from bmoe_lightning.data.tasks.arc import ARC
from bmoe_lightning.data.tasks.openbookqa import OpenBookQA

TEST_DATA = Path(os.environ.get("BMOE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def obqa(number: int = 0, **changes) -> dict:
    return {
        "id": f"7-{number}",
        "question_stem": f"Number {number} is",
        "choices": {"text": ["low", "high", "odd", "even"], "label": ["A", "B", "C", "D"]},
        "answerKey": "C",
    } | changes


def arc(number: int = 0, **changes) -> dict:
    row = obqa(number, **changes)
    row.setdefault("question", row.pop("question_stem"))
    return row


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))


@pytest.mark.parametrize("name", ["{}.jsonl", "{}.json"])
def test_lines_files(name, tmp_path):
    write_lines(tmp_path / name.format("train"), [arc(i) for i in range(3)])
    write_lines(tmp_path / name.format("test"), [arc(i) for i in range(2)])
    assert [q.id for q in load_questions(str(tmp_path), "train")] == ["7-0", "7-1", "7-2"]
    assert len(load_questions(tmp_path, "test")) == 2
    assert load_questions(tmp_path, "validation") is None


def test_parquet_rows(tmp_path):
    write_parquet(tmp_path / "main" / "train.parquet", [obqa(0), obqa(1)])
    first, second = load_questions(tmp_path, "train")
    assert (first.choices[first.answer], second.id) == ("odd", "7-1")


def test_malformed_rows_name_file_line_and_reason(tmp_path):
    write_lines(tmp_path / "train.jsonl", [obqa(0), obqa(1), obqa(2, answerKey="E"), obqa(3)])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 3: answerKey 'E' is none of the labels") as caught:
        load_questions(tmp_path, "train")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    write_parquet(tmp_path / "test.parquet", [obqa(0), obqa(1, answerKey="Z")])
    with pytest.raises(ValueError, match=r"test\.parquet, row 2: answerKey 'Z'"):
        load_questions(tmp_path, "test")


def test_two_rows_of_one_id_are_refused(tmp_path):
    write_lines(tmp_path / "test.jsonl", [obqa(0), obqa(1), obqa(0)])
    with pytest.raises(ValueError, match=r"line 3: the id '7-0' is that of .*test\.jsonl, line 1 too"):
        load_questions(tmp_path, "test")


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_validation_under_its_usual_names(name, tmp_path):
    write_lines(tmp_path / f"{name}.jsonl", [obqa(4)])
    assert load_questions(tmp_path, "validation")[0].id == "7-4"


def test_sub_folders_the_default_wins_and_others_must_be_named(tmp_path):
    write_lines(tmp_path / "both" / "ARC-Easy" / "train.jsonl", [arc(1)])
    write_lines(tmp_path / "both" / "ARC-Challenge" / "train.jsonl", [arc(2)])
    with pytest.raises(ValueError, match="several sub-folders: ARC-Challenge, ARC-Easy; name one"):
        load_questions(tmp_path / "both", "train")
    assert load_questions(f"{tmp_path / 'both'}:ARC-Easy", "train")[0].id == "7-1"
    write_lines(tmp_path / "obqa" / "additional" / "train.jsonl", [obqa(3)])
    write_lines(tmp_path / "obqa" / "main" / "train.jsonl", [obqa(4)])
    assert load_questions(tmp_path / "obqa", "train")[0].id == "7-4"


def test_task_may_be_named(tmp_path):
    write_lines(tmp_path / "train.jsonl", [arc(0)])
    for task in ("arc", ARC(), "bmoe_lightning.data.tasks.arc:ARC"):
        assert load_questions(tmp_path, "train", task=task)[0].id == "7-0"
    with pytest.raises(ValueError, match=r"line 1: question_stem missing; the columns found are \['answerKey'"):
        load_questions(tmp_path, "train", task="openbookqa")
    with pytest.raises(ValueError, match="unknown task 'openbook', did you mean 'openbookqa'"):
        load_questions(tmp_path, "train", task="openbook")


def test_rows_of_no_task_are_named(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"id": 1, "text": "?"}])
    with pytest.raises(ValueError, match=r"line 1: the columns \['id', 'text'\] fit none of .*; name the task"):
        load_questions(tmp_path, "train")


@dataclass(frozen=True)
class Renamed(ARC):
    """A data set whose splits have other names, and which has no validation split."""

    name: str = "renamed"
    columns: tuple[str, ...] = ("question", "answerKey", "renamed")
    train_splits: tuple[str, ...] = ("auxiliary_train",)
    validation_splits: tuple[str, ...] = ()
    test_splits: tuple[str, ...] = ("validation",)


@pytest.mark.parametrize("task", [Renamed(), None])
def test_a_task_decides_about_its_splits(tmp_path, monkeypatch, task):
    monkeypatch.setattr(registry._TASKS, "_registered", {} if task else {"renamed": Renamed})
    for name, number in (("auxiliary_train", 1), ("validation", 2), ("dev", 3)):
        write_lines(tmp_path / f"{name}.jsonl", [arc(number, renamed=True)])
    read = {split: load_questions(tmp_path, split, task=task) for split in ("train", "validation", "test")}
    assert {split: questions and questions[0].id for split, questions in read.items()} == {
        "train": "7-1",
        "validation": None,
        "test": "7-2",
    }


def test_an_empty_split_is_empty(tmp_path):
    write_lines(tmp_path / "train.jsonl", [])
    assert load_questions(tmp_path, "train") == ()


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_train_or_test_is_an_error(split, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"has no {split} split"):
        load_questions(tmp_path, split)


def test_unknown_split_and_sources_are_refused(tmp_path):
    write_lines(tmp_path / "train.jsonl", [obqa(0)])
    with pytest.raises(ValueError, match="unknown split 'dev'; choose from train, validation, test"):
        load_questions(tmp_path, "dev")
    for source, kind in ((tmp_path / "train.jsonl", "a file"), (tmp_path / "nowhere", "not there"), ("", "not there")):
        with pytest.raises(ValueError, match=f"is {kind}; give a folder, or a hub id"):
            load_questions(source, "train")
    with pytest.raises(ValueError, match="belongs to a hub id"):
        load_questions(tmp_path, "train", revision="abc")


def test_a_folder_that_cannot_be_entered_is_neither_missing_nor_a_hub_id():
    with unprivileged_folder() as folder:
        write_lines(folder / "inner" / "data" / "train.jsonl", [obqa(0)])
        (folder / "inner").chmod(0)
        with pytest.raises(DataUnavailableError, match=r"inner/data cannot be read \(.*Permission denied"):
            load_questions(folder / "inner" / "data", "train")


def test_a_broken_link_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "data").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="data source 'my/data' is not there"):
        load_questions("my/data", "train")


def test_hub_ids_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("allenai/openbookqa")
    assert is_hub_id("allenai/ai2_arc:ARC-Easy")
    (tmp_path / "allenai" / "openbookqa").mkdir(parents=True)
    assert not is_hub_id("allenai/openbookqa")


def test_splits_of_the_hub_under_two_names_are_refused(monkeypatch):
    rows = datasets.Dataset.from_list([obqa(0)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(validation=rows, dev=rows))
    with pytest.raises(ValueError, match="someone/else has one split under the names validation, dev; name a task"):
        load_questions("someone/else", "validation")


def test_a_copy_under_another_id_has_no_default_configuration(monkeypatch):
    calls = []

    def load_dataset(*arguments, **_):
        calls.append(arguments)
        return datasets.DatasetDict(train=datasets.Dataset.from_list([obqa(0)]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_questions("someone/copy", "train", task=OpenBookQA())[0].id == "7-0"
    assert load_questions("someone/copy:main", "train", task="openbookqa")[0].id == "7-0"
    assert calls == [("someone/copy", None), ("someone/copy", "main")]


def test_hub_switched_off_is_one_sentence_without_a_chain(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(DataUnavailableError, match=r"'allenai/openbookqa'.*local folder.*works instead") as caught:
        load_questions("allenai/openbookqa", "train")
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.__suppress_context__
    assert "\n" not in str(caught.value)


def test_arc_needs_its_config():
    with pytest.raises(ValueError, match="write allenai/ai2_arc:ARC-Easy or allenai/ai2_arc:ARC-Challenge"):
        load_questions("allenai/ai2_arc", "train")


@pytest.mark.parametrize(
    ("source", "make", "call"),
    [
        ("allenai/openbookqa", obqa, ("allenai/openbookqa", "main")),
        ("allenai/ai2_arc:ARC-Easy", arc, ("allenai/ai2_arc", "ARC-Easy")),
        ("someone/else", arc, ("someone/else", None)),
    ],
)
def test_hub_ids_reach_the_hub_library_as_id_and_config(source, make, call, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        rows = [make(0), make(1, answerKey="Z")]
        return datasets.DatasetDict(train=datasets.Dataset.from_list(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=f"{source} train, row 2: answerKey 'Z'"):
        load_questions(source, "train", revision="r1")
    assert calls == [(call, {"revision": "r1"})]
    assert load_questions(source, "validation") is None
    with pytest.raises(FileNotFoundError, match="has no test split"):
        load_questions(source, "test")


@pytest.mark.parametrize(
    ("name", "sizes", "widths"),
    [("openbookqa", (4957, 500), {4}), ("arc_easy", (2251, 2376), {3, 4, 5})],
)
def test_real_data(name, sizes, widths):
    folder = TEST_DATA / name
    if not folder.is_dir():
        pytest.skip(f"no {name} at hand; set BMOE_TEST_DATA to a folder that has it")
    train, test = load_questions(folder, "train"), load_questions(folder, "test")
    assert (len(train), len(test)) == sizes
    assert {len(q.choices) for q in (*train, *test)} == widths
    raw = [json.loads(line) for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    right = Counter(q.choices[q.answer] for q in test)
    assert right == Counter(
        dict(zip(r["choices"]["label"], r["choices"]["text"], strict=True))[r["answerKey"]] for r in raw
    )
    assert load_questions(folder, "validation") is None
