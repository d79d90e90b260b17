"""The command, with models of a few training steps."""

from __future__ import annotations

import json

import pytest

from recipes.generation.__main__ import main


def test_a_dry_run_writes_everything_and_repeats_nothing(tmp_path, capsys):
    arguments = ["--output-dir", str(tmp_path), "--seeds", "1", "--dry-run", "--quiet"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "addition, seed 0" in first
    assert "recall, seed 0" in first
    assert main(arguments) == 0
    second = capsys.readouterr().out
    assert "seed 0\n" not in second.partition("# DRY RUN")[0]
    assert second.strip() == (tmp_path / "report.md").read_text().strip()
    assert second.strip() in first
    results = json.loads((tmp_path / "results.json").read_text())
    assert [found["task"] for found in results["comparisons"]] == ["addition", "recall"]
    assert results["settings"]["dry_run"] is True
    assert main([*arguments, "--fisher", "empirical"]) == 1
    assert "was made with other options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "poetry"], "--tasks must be some of addition, recall, got poetry"),
        (["--tasks", ""], "--tasks must be some of addition, recall, got none"),
        (["--tasks", "recall,recall"], "--tasks names one twice"),
        (["--seeds", "0"], "--seeds must be at least 1"),
    ],
)
def test_wrong_options_have_one_sentence(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_one_is_refused_before_training(tmp_path, capsys, monkeypatch):
    def trained(settings):
        raise AssertionError("something is trained")

    monkeypatch.setattr("recipes.generation.experiment.all_answers", trained)
    (tmp_path / "file").touch()
    assert main(["--dry-run", "--output-dir", str(tmp_path / "file")]) == 1
    assert "File exists" in capsys.readouterr().err
