"""What the command says of a folder, before anything is trained."""

from __future__ import annotations

import pytest

from recipes.paper.outcomes import Study
from recipes.paper.stored_study import STUDY_FILE, begin_study
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.routers import run
from recipes.routers.__main__ import main


def test_a_folder_of_another_study_is_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SeedRun, "complete", lambda _: pytest.fail("a run is made"))
    begin_study(tmp_path, Study("small", "somebody/model", "recall", {}, (1,), (), ()), overwrite=False)
    before = (tmp_path / STUDY_FILE).read_bytes()
    assert main(["--seeds", "1", "--quiet", "--accelerator", "cpu", "--output-dir", str(tmp_path)]) == 1
    assert f"{tmp_path} holds another study: preset 'small' (here 'routers, small')" in capsys.readouterr().err
    assert (tmp_path / STUDY_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("action", "flags", "told"),
    [
        ("report", ("--report", "mine"), "the report in mine/report may be incomplete; run the same command again"),
        ("run", ("--output-dir", "mine"), "are stored in mine; run the same command again to resume"),
    ],
)
def test_a_command_that_is_stopped_names_its_folder(monkeypatch, capsys, action, flags, told):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, action, stopped)
    assert main(flags) == 130
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (("--methods", "temperature"), 2, "temperature replaces no router logits"),
        (("--set", "router_noise"), 2, "--set must be METHOD.OPTION=VALUE"),
        (("--report", "nowhere"), 1, "nowhere holds no finished study"),
        (("--report", "nowhere", "--seeds", "2"), 2, "leave --seeds out"),
    ],
)
def test_what_cannot_be_made_is_one_line(tmp_path, capsys, flags, status, said):
    flags = flags if flags[0] == "--report" else (*flags, "--output-dir", str(tmp_path))
    assert main(flags) == status
    line = capsys.readouterr().err
    assert said in line
    assert len(line.splitlines()) == 1
