"""What the command says of a folder, before anything is trained."""

from __future__ import annotations

import pytest

from recipes.paper import run
from recipes.paper.__main__ import main
from recipes.paper.outcomes import Study
from recipes.paper.stored_study import STUDY_FILE, begin_study
from recipes.qwen_obqa.seed_run import SeedRun


def test_a_folder_of_another_study_is_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SeedRun, "complete", lambda _: pytest.fail("a run is made"))
    begin_study(tmp_path, Study("qwen", "somebody/model", "openbookqa", {}, (1,), (), ()), overwrite=False)
    before = (tmp_path / STUDY_FILE).read_bytes()
    flags = ("--table", "3", "--seeds", "1", "--jobs", "1", "--quiet", "--accelerator", "cpu")
    assert main([*flags, "--output-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path} holds another study: preset 'qwen'" in said
    assert "first data set 'openbookqa' (here 'recall'); give another --output-dir, or --overwrite" in said
    assert (tmp_path / STUDY_FILE).read_bytes() == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("action", "flags", "told"),
    [
        ("report", ("--report", "mine"), "the report in mine/report may be incomplete; run the same command again"),
        ("run", ("--all", "--output-dir", "mine"), "are stored in mine; run the same command again to resume"),
    ],
)
def test_a_command_that_is_stopped_names_its_folder(monkeypatch, capsys, action, flags, told):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, action, stopped)
    assert main(flags) == 130
    assert told in capsys.readouterr().err


def test_a_report_of_nothing_is_one_line(tmp_path, capsys):
    assert main(["--report", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path} holds no finished study; check the path, or make the study first"
    ]
