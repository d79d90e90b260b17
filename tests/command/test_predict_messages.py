"""What `predict` says of a file that it cannot read as it is given."""

from __future__ import annotations

import pytest
from finetuner_cases import CALIBRATION, TEST
from predict_cases import names_in, read, run, without_model
from serving_cases import rows_of, write_rows

from bmoe_lightning.command import predict as command

ROW = {"question": "is it ?", "choices": ["yes", "no"]}
ARC = {"id": "x", "question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({**ROW, "question": None}, "question is null; give a value, or drop the row"),
        ({**ROW, "choices": None}, "choices is null; give a value, or drop the row"),
        ({**ROW, "choices": "abcd"}, "choices must be a list, found the text 'abcd'"),
        ({**ROW, "choices": ["a", None]}, "question '0': choice B must be a text, found null"),
        ({**ROW, "choices": ["a", 3]}, "question '0': choice B must be a text, found the number 3"),
        ({**ROW, "question": ["a"]}, "question must be a text, found the list ['a']"),
        ({**ROW, "passage": {"a": 1}}, "passage must be a text, found the object {'a': 1}"),
        ({**ROW, "answer": "B"}, "question '0': answer must be an integer position counted from 0, found the text 'B'"),
        ({**ROW, "answer": 1.0}, "answer must be an integer position counted from 0, found the number 1.0"),
        ({**ROW, "id": True}, "id must be a text or a number, found the boolean True"),
        ({"choices": ["a", "b"], "text": "is it ?"}, "question missing; the columns found are ['choices', 'text']"),
        (ARC, "found the object {'label': ['A', 'B'], 'text': ['a', 'b']}; --task arc reads rows with these columns"),
        ({"question_stem": "Which?", "answerKey": "A"}, "; --task openbookqa reads rows with these columns"),
    ],
)
def test_a_row_is_refused_with_its_value_and_what_is_expected(tmp_path, capsys, row, sentence):
    source = write_rows(tmp_path / "q.jsonl", [row])
    assert run("gone", source, tmp_path / "out.jsonl") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {source}, line 1: ")
    assert said.endswith(f"{sentence}\n")


def test_a_null_of_a_task_is_named(tmp_path, capsys):
    source = write_rows(tmp_path / "q.jsonl", [{**ARC, "question": None}])
    assert run("gone", source, tmp_path / "out.jsonl", "--task", "arc") == 1
    assert f"{source}, line 1: question is null; give a value" in capsys.readouterr().err


@pytest.mark.parametrize("quiet", [True, False])
def test_questions_that_lose_words_are_counted_once(saved, tmp_path, capsys, recwarn, quiet):
    """As many of them lose words as in training, where a warning says how many do."""
    long = {"question": " ".join(["is"] * 3000), "choices": ["c0", "c1"]}
    of_passage = {"question": "is it ?", "choices": ["c0", "c1"], "passage": " ".join(["is"] * 3000)}
    source = write_rows(tmp_path / "q.jsonl", [*rows_of(answers=False), long, of_passage])
    arguments = (saved, source, tmp_path / "out.jsonl", "--method", "map", "--batch-size", "1")
    assert run(*arguments, quiet=quiet) == 0
    said = capsys.readouterr().err
    assert said.splitlines() == [
        f"warning: 2 of {len(TEST) + 2} questions of {source} are longer than the 256 tokens of prompts that the model "
        "was fine-tuned with; words were cut from their passage, or from the front of a question without one; the "
        f"first is {source}, line {len(TEST) + 1}"
    ]
    assert not recwarn.list
    assert len(read(tmp_path / "out.jsonl")) == len(TEST) + 2


def test_a_question_that_does_not_fit_is_refused_without_an_option_of_training(saved, tmp_path, monkeypatch, capsys):
    without_model(monkeypatch)
    long = {"question": "is it ?", "choices": [" ".join(["c0"] * 200), " ".join(["c1"] * 200)]}
    source = write_rows(tmp_path / "q.jsonl", [ROW, long])
    assert run(saved, source, tmp_path / "out.jsonl") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {source}, line 2: question '1': cut to the last word of its text, the prompt ")
    assert said.endswith("the model was fine-tuned with prompts of at most 256; shorten or drop it\n")
    assert "max_length" not in said


def test_ids_may_repeat_and_rows_resume_by_their_number(saved, tmp_path, monkeypatch):
    source = write_rows(tmp_path / "q.jsonl", [{**row, "id": "same"} for row in rows_of()])
    kept, write = [], command._write

    def spy(output, partial):
        kept.append(partial.read_bytes())
        write(output, partial)

    arguments = ("--method", "temperature", "--batch-size", "2")
    with monkeypatch.context() as patch:
        patch.setattr(command, "_write", spy)
        assert run(saved, source, tmp_path / "whole.jsonl", *arguments) == 0
    lines = kept[0].splitlines(keepends=True)
    (tmp_path / "out.jsonl.partial").write_bytes(b"".join(lines[:4]))
    assert run(saved, source, tmp_path / "out.jsonl", *arguments) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    rows = read(tmp_path / "out.jsonl")
    assert {row["id"] for row in rows} == {"same"}
    assert [row["answer"] for row in rows] == ["ABCD"[question.answer] for question in TEST]


def test_method_and_run_are_checked_before_the_model_is_loaded(saved, data, tmp_path, monkeypatch, capsys):
    without_model(monkeypatch)
    for method in ("nope", "bayesian_lora"):
        assert run(saved, data, tmp_path / "out.jsonl", "--method", method) == 1
        assert f"error: this model has no method '{method}'; it has map, temperature" in capsys.readouterr().err
    file = write_rows(tmp_path / "file", rows_of(CALIBRATION))
    for folder, found in ((tmp_path / "gone", "is not there"), (file, "is a file"), (tmp_path, "has no calibrated")):
        assert run(folder, data, tmp_path / "out.jsonl") == 1
        assert f"error: --run {folder} {found}" in capsys.readouterr().err
    assert names_in(tmp_path) == ["file", data.name]
