"""Prediction sets of a file: their letters and coverage, and which labels are refused."""

from __future__ import annotations

import pytest
from finetuner_cases import CALIBRATION, TEST
from predict_cases import read, run, without_model
from serving_cases import rows_of, write_rows

from bmoe_lightning.command import predict as command
from bmoe_lightning.command.main import main
from bmoe_lightning.serving import CalibratedModel


class TestSets:
    def test_have_the_letters_up_to_the_threshold_of_other_labels(self, saved, tmp_path, capsys):
        labelled = write_rows(tmp_path / "labelled.jsonl", rows_of(CALIBRATION))
        source = write_rows(tmp_path / "q.jsonl", rows_of(TEST))
        same = ("--method", "laplace_lpo", "--coverage", "0.7", "--set-score", "aps", "--sets-from", labelled)
        assert run(saved, source, tmp_path / "out.jsonl", *same) == 0
        assert run(saved, source, tmp_path / "out.parquet", *same) == 0
        served = CalibratedModel.from_pretrained(saved)
        sets = served.prediction_sets(CALIBRATION, "laplace_lpo", coverage=0.7, score="aps")
        assert sets.num_labels == len(CALIBRATION)
        expected = sets(served.predict(TEST, "laplace_lpo").log_probs)
        rows = read(tmp_path / "out.jsonl")
        assert [row["set"] for row in rows] == [
            [letter for letter, chosen in zip("ABCD", of_row, strict=False) if chosen] for of_row in expected.tolist()
        ]
        assert all(row["prediction"] in row["set"] for row in rows)
        assert read(tmp_path / "out.parquet") == rows
        capsys.readouterr()
        arguments = ["--run", saved, "--data", source, "--output", tmp_path / "told.jsonl", "--device", "cpu", *same]
        assert main(["predict", *map(str, arguments)]) == 0
        covered = sum(row["answer"] in row["set"] for row in rows) / len(rows)
        assert f"set coverage {covered:.3f}" in capsys.readouterr().out

    def test_of_other_labels_do_not_resume(self, saved, tmp_path, capsys):
        labelled = write_rows(tmp_path / "labelled.jsonl", rows_of(CALIBRATION))
        source, output = write_rows(tmp_path / "q.jsonl", rows_of(TEST)), tmp_path / "out.jsonl"
        options = ("--method", "map", "--batch-size", "2", "--sets-from", labelled, "--coverage", "0.7")
        assert run(saved, source, output, *options) == 0
        whole = output.read_bytes()
        header, first = whole_partial(saved, source, tmp_path, options)
        partial = output.with_name("out.jsonl.partial")
        partial.write_bytes(header + first)
        assert run(saved, source, output, *options, "--coverage", "0.5", "--overwrite") == 0
        assert output.read_bytes() != whole
        output.unlink()
        partial.write_bytes(header + first)
        assert run(saved, source, output, *options, "--coverage", "0.5") == 1
        assert "has predictions of another command" in capsys.readouterr().err
        assert run(saved, source, output, *options) == 0
        assert output.read_bytes() == whole

    @pytest.mark.parametrize(
        ("rows", "options", "sentence"),
        [
            (rows_of(CALIBRATION), ("--coverage", "1"), "--coverage is 1.0; it must be between 0 and 1"),
            ([], (), "has no rows"),
            (
                rows_of(CALIBRATION[:3]),
                (),
                "labelled.jsonl: 3 labels are too few for a coverage of 0.9: every set would have all classes; give at",
            ),
            ([*rows_of(CALIBRATION), {"question": "Which?", "choices": ["a", "b"]}], (), "no answer; every question"),
        ],
        ids=["coverage", "empty", "few", "unlabelled"],
    )
    def test_are_refused_before_the_model_is_loaded(
        self, saved, data, tmp_path, monkeypatch, capsys, rows, options, sentence
    ):
        without_model(monkeypatch)
        labelled = write_rows(tmp_path / "labelled.jsonl", rows)
        assert run(saved, data, tmp_path / "out.jsonl", "--sets-from", labelled, *options) == 1
        assert sentence in capsys.readouterr().err
        copy = tmp_path / "copy.jsonl"
        copy.write_bytes(data.read_bytes())
        for same in (data, copy):
            assert run(saved, data, tmp_path / "out.jsonl", "--sets-from", same) == 1
            assert "is the file of --data" in capsys.readouterr().err


def whole_partial(saved, source, tmp_path, options):
    """The header and the first batch of a partial file of a command."""
    kept, write = [], command._write

    def spy(output, partial):
        kept.append(partial.read_bytes())
        write(output, partial)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_write", spy)
        assert run(saved, source, tmp_path / "other.jsonl", *options) == 0
    lines = kept[0].splitlines(keepends=True)
    return lines[0], b"".join(lines[1:3])


def test_labels_of_sets_are_not_replaced_and_options_of_sets_need_them(saved, data, tmp_path, capsys, monkeypatch):
    without_model(monkeypatch)
    labelled = write_rows(tmp_path / "mine.jsonl", rows_of(CALIBRATION))
    before = labelled.read_bytes()
    assert run(saved, data, labelled, "--sets-from", labelled, "--overwrite") == 1
    assert "is the file of --sets-from; give another name" in capsys.readouterr().err
    assert labelled.read_bytes() == before
    assert run(saved, data, tmp_path / "out.jsonl", "--coverage", "0.8") == 1
    assert "give --sets-from too, or leave them out" in capsys.readouterr().err
    assert run(saved, data, tmp_path / "out.jsonl", "--task", "os:path") == 1
    assert "--task os:path" in capsys.readouterr().err
