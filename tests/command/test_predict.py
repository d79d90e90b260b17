"""Predictions of a file: what is read and written, what is refused, and what a stopped command leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finetuner_cases import TEST
from predict_cases import EVERY, names_in, read, run, without_model
from serving_cases import as_run, rows_of, write_rows

from bmoe_lightning.command import predict as command
from bmoe_lightning.command.main import main
from bmoe_lightning.serving import CalibratedModel, prediction_files


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("method", [None, "laplace_lpo", "map"])
def test_rows_are_the_predictions_of_the_model(saved, data, tmp_path, suffix, method):
    source = data
    if suffix == "parquet":
        source = tmp_path / "questions.parquet"
        pq.write_table(pa.Table.from_pylist(rows_of(EVERY)), source)
    output = tmp_path / "new" / f"out.{suffix}"
    assert run(saved, source, output, *(() if method is None else ("--method", method))) == 0
    served = CalibratedModel.from_pretrained(saved)
    found, rows = served.predict(EVERY, method), read(output)
    assert [row["id"] for row in rows] == [question.id for question in EVERY]
    assert [row["answer"] for row in rows] == ["ABCD"[question.answer] for question in EVERY]
    for number, (row, question) in enumerate(zip(rows, EVERY, strict=True)):
        assert row["probabilities"] == found.probabilities[number, : len(question.choices)].tolist()
        assert row["entropy"] == float(found.entropy[number])
        assert row["prediction"] == "ABCD"[int(found.probabilities[number].argmax())]
        assert ("mutual_information" in row) == (method == "laplace_lpo")
    assert list(output.parent.iterdir()) == [output]  # nothing of the work is left


def test_answers_may_be_known_of_some_questions_only(saved, tmp_path):
    rows = rows_of(TEST)
    del rows[0]["answer"], rows[3]["answer"]
    source = write_rows(tmp_path / "q.jsonl", rows)
    assert run(saved, source, tmp_path / "out.jsonl", "--method", "map") == 0
    assert run(saved, source, tmp_path / "out.parquet", "--method", "map") == 0
    known = [row.get("answer") for row in read(tmp_path / "out.jsonl")]
    assert [answer is None for answer in known] == ["answer" not in row for row in rows]
    assert [row["answer"] for row in read(tmp_path / "out.parquet")] == known


def test_many_groups_of_parquet_have_one_schema(saved, data, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_files, "_ROWS_OF_A_GROUP", 3)
    assert run(saved, data, tmp_path / "out.parquet", "--method", "laplace_lpo") == 0
    assert run(saved, data, tmp_path / "out.jsonl", "--method", "laplace_lpo") == 0
    assert read(tmp_path / "out.parquet") == read(tmp_path / "out.jsonl")


@pytest.mark.parametrize("options", [(), ("--quiet",)])
def test_the_numbers_of_labelled_questions_are_printed_with_and_without_progress(
    saved, data, tmp_path, capsys, options
):
    arguments = ["--run", saved, "--data", data, "--output", tmp_path / "out.jsonl", "--method", "temperature"]
    assert main(["predict", *map(str, arguments), *options]) == 0
    said = capsys.readouterr().out
    assert f"{len(EVERY)} predictions of temperature are in {tmp_path / 'out.jsonl'}" in said
    assert "ACC 0." in said
    assert "NLL" in said


def test_ids_may_be_numbers_or_missing_and_texts_in_any_language(saved, tmp_path):
    texts = ["是 number3 吗 ?", "Größe ? \u2028 №", "😀 test number1 ?"]
    rows = [{"question": text, "choices": ["c0", "c1"]} for text in texts]
    rows[0]["id"], rows[2]["id"] = 7, "für 2"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "q.jsonl").write_text("\n" + lines.replace("\n", "\r\n"), encoding="utf-8")
    assert run(saved, tmp_path / "q.jsonl", tmp_path / "out.jsonl") == 0
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == ["7", "1", "für 2"]
    assert "answer" not in read(tmp_path / "out.jsonl")[0]


def test_rows_may_have_the_columns_of_a_task(saved, tmp_path, capsys):
    of_boolq = {"question": "is it red", "passage": "It is red.", "answer": True}
    source = write_rows(tmp_path / "q.jsonl", [of_boolq, {**of_boolq, "question": "is it blue", "answer": False}])
    assert run(saved, source, tmp_path / "out.jsonl", "--task", "boolq") == 0
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == 2
    assert {row["answer"] for row in rows} == {"A", "B"}
    assert run(saved, source, tmp_path / "other.jsonl", "--task", "nothing") == 1
    assert "nothing" in capsys.readouterr().err
    assert run(saved, source, tmp_path / "other.jsonl") == 1
    assert f"{source}, line 1: choices missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ("3", "a JSON int"),
        ('{"question": "a"}', "choices missing"),
        ('{"question": "a", "choices": ["b"]}', "1 choices"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 5}', "outside its 2 choices"),
        ('{"question": "a", "choices": ["b", "c"], "id": {}}', "id must be a text or a number"),
        ('{"question": "\\ud800", "choices": ["b", "c"]}', "not valid Unicode"),
        ('{"question": "a", "question": "b", "choices": ["b", "c"]}', "duplicate"),
    ],
)
def test_a_malformed_row_is_named_before_the_model_is_loaded(tmp_path, monkeypatch, capsys, line, message):
    without_model(monkeypatch)
    source = write_rows(tmp_path / "q.jsonl", rows_of())
    source.write_text(source.read_text() + line + "\n")
    assert run("gone", source, tmp_path / "out.jsonl") == 1
    said = capsys.readouterr().err
    assert f"error: {source}, line {len(TEST) + 1}: " in said
    assert message in said
    assert names_in(tmp_path) == ["q.jsonl"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("q.jsonl", "out.txt"), (), "must end in .jsonl or .parquet"),
        (("q.jsonl", "out"), (), "must end in"),
        (("q.jsonl", "old.jsonl"), (), "exists; give --overwrite"),
        (("q.jsonl", "q.jsonl"), ("--overwrite",), "is the file of --data"),
        (("q.jsonl", "out.jsonl"), ("--batch-size", "0"), "--batch-size is 0"),
        (("q.jsonl", "out.jsonl"), ("--device", "nothing"), "--device nothing cannot be used"),
        (("q.jsonl", "out.jsonl"), ("--device", "cuda:99"), "--device cuda:99 cannot be used"),
        (("q.csv", "out.jsonl"), (), "must be a file in JSON Lines"),
        (("gone.jsonl", "out.jsonl"), (), "gone.jsonl cannot be read"),
        (("empty.jsonl", "out.jsonl"), (), "has no rows"),
        (("bad.parquet", "out.jsonl"), (), "is no valid parquet file"),
        (("folder.jsonl", "out.jsonl"), (), "is a folder"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(tmp_path, monkeypatch, capsys, names, options, message):
    without_model(monkeypatch)
    write_rows(tmp_path / "q.jsonl", rows_of())
    (tmp_path / "old.jsonl").write_text("old")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.parquet").write_text("bad")
    (tmp_path / "folder.jsonl").mkdir()
    before = names_in(tmp_path)
    assert run("gone", tmp_path / names[0], tmp_path / names[1], *options) == 1
    assert message in capsys.readouterr().err
    assert names_in(tmp_path) == before
    assert (tmp_path / "old.jsonl").read_text() == "old"


def test_what_cannot_be_loaded_leaves_nothing(saved, data, tmp_path, capsys):
    assert run(tmp_path / "gone", data, tmp_path / "out.jsonl") == 1
    assert run(saved, data, tmp_path / "out.jsonl", "--method", "nothing") == 1
    assert "it has map, temperature" in capsys.readouterr().err
    assert names_in(tmp_path) == [data.name]
    five = {"question": "a", "choices": list("abcde")}
    assert run(saved, write_rows(data, [five]), tmp_path / "out.jsonl") == 1
    assert "has 5 choices" in capsys.readouterr().err


@pytest.fixture
def whole(saved, data, tmp_path):
    """A finished output, and the partial file just before its end."""
    kept, output = {}, tmp_path / "whole.jsonl"
    write = command._write

    def spy(out, partial):
        kept["partial"] = partial.read_bytes()
        write(out, partial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_write", spy)
        assert run(saved, data, output, "--method", "laplace_lpo", "--batch-size", "4") == 0
    return output.read_bytes(), kept["partial"]


def predicted(monkeypatch):
    """The numbers of questions of the batches that are predicted from here on."""
    sizes, predict_batches = [], CalibratedModel.predict_batches

    def spy(self, *arguments, **options):
        for group, found in predict_batches(self, *arguments, **options):
            sizes.append(len(group))
            yield group, found

    monkeypatch.setattr(CalibratedModel, "predict_batches", spy)
    return sizes


def lengths(content):
    """Where a killed process may have stopped: ends of lines, and within them."""
    ends = [index + 1 for index, byte in enumerate(content) if byte == 10]
    return [0, 5, ends[0] - 1, ends[0], ends[3] - 7, ends[4], ends[6] - 1, ends[-1] - 7, ends[-1]]


def test_a_stopped_command_resumes_to_the_same_bytes(saved, data, whole, tmp_path, monkeypatch):
    expected, partial = whole
    output = tmp_path / "out.jsonl"
    for length in lengths(partial):
        output.with_name("out.jsonl.partial").write_bytes(partial[:length])
        with monkeypatch.context() as patch:
            sizes = predicted(patch)
            assert run(saved, data, output, "--method", "laplace_lpo", "--batch-size", "4") == 0
        done = max(partial[:length].count(b"\n") - 1, 0) // 4 * 4
        assert sum(sizes) == len(EVERY) - done
        assert output.read_bytes() == expected
        assert not output.with_name("out.jsonl.partial").exists()
        output.unlink()


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "map", "--batch-size", "4"),
        ("--method", "laplace_lpo", "--batch-size", "2"),
        ("--overwrite",),
        None,
    ],
)
def test_other_work_is_neither_resumed_nor_lost(saved, data, whole, tmp_path, monkeypatch, capsys, options):
    same = ("--method", "laplace_lpo", "--batch-size", "4")
    (tmp_path / "out.jsonl.partial").write_bytes(before := whole[1][: len(whole[1]) // 2])
    if options is None:  # other data, of the same number of questions
        write_rows(data, rows_of((*EVERY[1:], EVERY[0])))
    elif options == ("--overwrite",):
        options = (*same, "--overwrite")
        (tmp_path / "out.jsonl").write_text("old")
    sizes, options = predicted(monkeypatch), same if options is None else options
    if "--overwrite" not in options:
        assert run(saved, data, tmp_path / "out.jsonl", *options) == 1
        assert "has predictions of another command, or something else; give --overwrite" in capsys.readouterr().err
        assert (tmp_path / "out.jsonl.partial").read_bytes() == before
        options = (*options, "--overwrite")
    assert run(saved, data, tmp_path / "out.jsonl", *options) == 0
    assert sum(sizes) == len(EVERY)
    assert len(read(tmp_path / "out.jsonl")) == len(EVERY)


def test_a_damaged_partial_file_is_resumed_before_the_damage(saved, data, whole, tmp_path):
    expected, partial = whole
    middle = len(partial) // 2
    (tmp_path / "out.jsonl.partial").write_bytes(partial[:middle] + b"\0\0\0\n\0" + partial[middle:])
    assert run(saved, data, tmp_path / "out.jsonl", "--method", "laplace_lpo", "--batch-size", "4") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == expected


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[]\n", b"3", b"notes of mine\n"])
def test_a_file_that_is_not_ours_stays(saved, data, tmp_path, capsys, content):
    (tmp_path / "out.jsonl.partial").write_bytes(content)
    assert run(saved, data, tmp_path / "out.jsonl") == 1
    assert "or something else; give --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl.partial").read_bytes() == content


@pytest.mark.parametrize("content", ['{"added_tokens": []}', "no JSON"])
def test_another_tokenizer_than_that_of_the_fit_is_named_before_it_is_read(copied, data, tmp_path, capsys, content):
    (as_run(copied) / "tokenizer.json").write_text(content)
    assert run(copied, data, tmp_path / "out.jsonl") == 1
    assert "tokenizer.json is not the file of the fit" in capsys.readouterr().err


def test_what_the_model_cannot_be_asked_is_named_before_it_is_loaded(saved, tmp_path, monkeypatch, capsys):
    without_model(monkeypatch)
    source = write_rows(tmp_path / "q.jsonl", [*rows_of(), {"question": "a", "choices": list("abcde")}])
    assert run(saved, source, tmp_path / "out.jsonl") == 1
    assert f"error: {source}, line {len(TEST) + 1}: question '{len(TEST)}' has 5 choices" in capsys.readouterr().err
    assert names_in(tmp_path) == ["q.jsonl"]


def test_a_stop_with_the_keyboard_resumes(saved, data, whole, tmp_path, monkeypatch, capsys):
    predict_batches = CalibratedModel.predict_batches

    def stopped(self, *arguments, **options):
        yield from islice(predict_batches(self, *arguments, **options), 2)
        raise KeyboardInterrupt

    arguments = (saved, data, tmp_path / "out.jsonl", "--method", "laplace_lpo", "--batch-size", "4")
    with monkeypatch.context() as patch:
        patch.setattr(CalibratedModel, "predict_batches", stopped)
        assert run(*arguments) == 130
    assert "run the same command again, without --overwrite, to resume" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert run(*arguments) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole[0]


SLOW = """
import sys, time
import torch
torch.set_num_threads(1)
from bmoe_lightning.command.main import main
from bmoe_lightning.serving import CalibratedModel
predict_batches = CalibratedModel.predict_batches
def slow(*arguments, **options):
    for found in predict_batches(*arguments, **options):
        time.sleep(float(sys.argv[1]))
        yield found
CalibratedModel.predict_batches = slow
sys.exit(main(sys.argv[2:]))
"""


def started(seconds, *arguments):
    options = {"env": {**os.environ, "HF_HUB_OFFLINE": "1"}, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SLOW, str(seconds), "predict", *map(str, arguments)], **options)


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_one_process_writes_an_output_and_a_killed_one_is_resumed(saved, data, whole, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    partial = output.with_name("out.jsonl.partial")
    same = ("--method", "laplace_lpo", "--batch-size", "4")
    options = ("--run", saved, "--data", data, "--output", output, "--device", "cpu", "--quiet", *same)
    first = started(1.0, *options)
    wait_for(lambda: partial.exists() and partial.read_bytes().count(b"\n") > 4, first)
    assert run(saved, data, output, *same) == 1
    assert f"another process is writing --output {output}" in capsys.readouterr().err
    assert run(saved, data, output, *same, "--overwrite") == 1
    assert run(saved, data, tmp_path / "beside.jsonl", *same) == 0  # in the same folder
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not output.exists()
    assert partial.read_bytes().count(b"\n") > 4
    assert run(saved, data, output, *same) == 0
    assert output.read_bytes() == whole[0] == (tmp_path / "beside.jsonl").read_bytes()
    assert not partial.exists()


def test_an_output_that_appears_in_the_meantime_stays(saved, data, tmp_path, monkeypatch, capsys):
    output, locked = tmp_path / "out.jsonl", command.locked

    def late(given):
        output.write_text("of another process")
        return locked(given)

    monkeypatch.setattr(command, "locked", late)
    assert run(saved, data, output) == 1
    assert "exists; give --overwrite" in capsys.readouterr().err
    assert output.read_text() == "of another process"
