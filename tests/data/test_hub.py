import json
import os
from collections import Counter
from pathlib import Path

import datasets
import pytest

from bmoe_lightning.data.hub import (
    TASKS,
    DataUnavailableError,
    is_hub_id,
    load_questions,
    parse_arc,
    parse_openbookqa,
)

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


def test_openbookqa_row():
    question = parse_openbookqa(obqa(5), "f, line 1")
    assert (question.id, question.question, question.answer) == ("7-5", "Number 5 is", 2)
    assert question.choices == ("low", "high", "odd", "even")


def test_label_and_text_are_not_swapped():
    question = parse_arc(arc(), "f, line 1")
    assert "A" not in question.choices
    assert question.choices[question.answer] == "odd"


def test_numeric_labels_are_looked_up_and_not_computed_from_the_character():
    row = arc(choices={"text": ["a", "b", "c", "d"], "label": ["1", "2", "3", "4"]}, answerKey="2")
    assert ord("2") - ord("A") != 1
    assert parse_arc(row, "f, line 1").answer == 1


def test_the_key_is_looked_up_even_where_labels_are_out_of_order():
    row = arc(choices={"text": ["w", "x", "y", "z"], "label": ["D", "B", "A", "C"]}, answerKey="A")
    question = parse_arc(row, "f, line 1")
    assert question.choices[question.answer] == "y"


def test_integer_labels_and_a_padded_key():
    row = arc(choices={"text": ["a", "b", "c"], "label": [1, 2, 3]}, answerKey=" 3\n")
    assert parse_arc(row, "f, line 1").answer == 2


@pytest.mark.parametrize("count", [3, 4, 5])
def test_three_to_five_choices(count):
    labels = list("ABCDE")[:count]
    row = arc(choices={"text": [f"t{label}" for label in labels], "label": labels}, answerKey=labels[-1])
    question = parse_arc(row, "f, line 1")
    assert len(question.choices) == count
    assert question.answer == count - 1


@pytest.mark.parametrize("parse", [parse_openbookqa, parse_arc])
def test_nested_form_of_the_original_archives(parse):
    pairs = [{"text": "one", "label": "A"}, {"text": "two", "label": "B"}, {"text": "three", "label": "C"}]
    question = parse({"id": "x", "question": {"stem": "Which?", "choices": pairs}, "answerKey": "B"}, "f, line 1")
    assert (question.question, question.choices, question.answer) == ("Which?", ("one", "two", "three"), 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answerKey": "E"}, r"answerKey 'E' is none of the labels \['A', 'B', 'C', 'D'\]"),
        ({"answerKey": ""}, "answerKey is empty"),
        ({"answerKey": None}, "answerKey is empty"),
        ({"id": None}, "id missing"),
        ({"question_stem": ""}, "question_stem missing"),
        ({"question_stem": "  "}, "question is empty"),
        ({"choices": None}, "choices missing"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}, "2 choice texts but 1 labels"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "A"]}, "answerKey": "A"}, "not all different"),
        ({"choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}, "has 1 choices"),
        ({"choices": {"text": ["a", ""], "label": ["A", "B"]}, "answerKey": "A"}, "choice B is empty"),
        ({"choices": {"text": ["a", "b"]}, "answerKey": "A"}, "must hold 'text' and 'label'"),
        ({"choices": ["a", "b"], "answerKey": "A"}, "must hold 'text' and 'label'"),
        ({"choices": 4}, "must hold 'text' and 'label'"),
    ],
)
def test_malformed_rows_name_file_line_and_reason(changes, reason, tmp_path):
    write_lines(tmp_path / "train.jsonl", [obqa(0), obqa(1), obqa(2, **changes), obqa(3)])
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 3: .*{reason}") as caught:
        load_questions(tmp_path, "train")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{oops", "not a JSON object"), ("[1, 2]", "a JSON list"), ("3", "a JSON int"), ("\udcff", "not a JSON object")],
)
def test_lines_that_are_no_objects_are_named(text, reason, tmp_path):
    lines = (json.dumps(obqa(0)) + "\n\n" + text + "\n").encode("utf-8", "surrogateescape")
    (tmp_path / "test.jsonl").write_bytes(lines)
    with pytest.raises(ValueError, match=rf"test\.jsonl, line 3: {reason}"):
        load_questions(tmp_path, "test")


def test_a_byte_order_mark_and_unicode_line_separators_are_read(tmp_path):
    row = obqa(0, question_stem="before\u2028after")
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode())
    assert load_questions(tmp_path, "train")[0].question == "before\u2028after"


@pytest.mark.parametrize("name", ["{}.jsonl", "{}.json"])
def test_lines_files(name, tmp_path):
    write_lines(tmp_path / name.format("train"), [obqa(i) for i in range(3)])
    write_lines(tmp_path / name.format("test"), [arc(i) for i in range(2)])
    assert [q.id for q in load_questions(str(tmp_path), "train")] == ["7-0", "7-1", "7-2"]
    assert len(load_questions(tmp_path, "test")) == 2
    assert load_questions(tmp_path, "validation") is None


@pytest.mark.parametrize(
    "shards",
    [
        ["train.parquet"],
        ["train-00000-of-00001.parquet"],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
    ],
)
@pytest.mark.parametrize("folder", ["", "main"])
def test_parquet_as_the_hub_lays_it_out(shards, folder, tmp_path):
    for number, name in enumerate(shards):
        write_parquet(tmp_path / folder / name, [obqa(10 * number + i) for i in range(2)])
    expected = [f"7-{10 * number + i}" for number in range(len(shards)) for i in range(2)]
    questions = load_questions(tmp_path, "train")
    assert [q.id for q in questions] == expected
    assert questions[0].choices[questions[0].answer] == "odd"


def test_malformed_parquet_row_is_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", [obqa(0), obqa(1, answerKey="Z")])
    with pytest.raises(ValueError, match=r"train\.parquet, row 2: answerKey 'Z'"):
        load_questions(tmp_path, "train")


def test_a_missing_shard_is_refused(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00003.parquet", [obqa(0)])
    with pytest.raises(ValueError, match="one of 3 shards, but 1 are there"):
        load_questions(tmp_path, "train")


@pytest.mark.parametrize("name", ["validation", "valid", "dev"])
def test_validation_under_its_usual_names(name, tmp_path):
    write_lines(tmp_path / f"{name}.jsonl", [obqa(4)])
    assert load_questions(tmp_path, "validation")[0].id == "7-4"


def test_a_split_in_two_forms_is_refused(tmp_path):
    write_lines(tmp_path / "train.jsonl", [obqa(0)])
    write_parquet(tmp_path / "train.parquet", [obqa(1)])
    with pytest.raises(ValueError, match=r"more than once: train\.jsonl, train\.parquet"):
        load_questions(tmp_path, "train")


def test_other_files_that_begin_alike_are_left_alone(tmp_path):
    write_parquet(tmp_path / "testimony.parquet", [obqa(0)])
    write_lines(tmp_path / "test.jsonl", [obqa(1)])
    assert load_questions(tmp_path, "test")[0].id == "7-1"


def test_sub_folders_main_wins_and_others_must_be_named(tmp_path):
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
    assert set(TASKS) == {"openbookqa", "arc"}
    assert load_questions(tmp_path, "train", task="arc")[0].id == "7-0"
    with pytest.raises(ValueError, match=r"line 1: question_stem missing; the columns found are \['answerKey'"):
        load_questions(tmp_path, "train", task="openbookqa")
    with pytest.raises(ValueError, match="task 'boolq' is not known; choose from openbookqa, arc"):
        load_questions(tmp_path, "train", task="boolq")


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_train_or_test_is_an_error(split, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"has no {split} split"):
        load_questions(tmp_path, split)


def test_unknown_split_and_sources_are_refused(tmp_path):
    write_lines(tmp_path / "train.jsonl", [obqa(0)])
    with pytest.raises(ValueError, match="split 'dev' is not known"):
        load_questions(tmp_path, "dev")
    for source, kind in ((tmp_path / "train.jsonl", "a file"), (tmp_path / "nowhere", "not there"), ("", "not there")):
        with pytest.raises(ValueError, match=f"is {kind}; give a folder, or a hub id"):
            load_questions(source, "train")
    with pytest.raises(ValueError, match="belongs to a hub id"):
        load_questions(tmp_path, "train", revision="abc")


def test_hub_ids_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("allenai/openbookqa")
    assert is_hub_id("allenai/ai2_arc:ARC-Easy")
    (tmp_path / "allenai" / "openbookqa").mkdir(parents=True)
    assert not is_hub_id("allenai/openbookqa")


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
    ("source", "call"),
    [
        ("allenai/openbookqa", ("allenai/openbookqa", "main")),
        ("allenai/ai2_arc:ARC-Easy", ("allenai/ai2_arc", "ARC-Easy")),
        ("someone/else", ("someone/else", None)),
    ],
)
def test_hub_ids_reach_the_hub_library_as_id_and_config(source, call, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.DatasetDict(train=datasets.Dataset.from_list([obqa(0), obqa(1, answerKey="Z")]))

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
