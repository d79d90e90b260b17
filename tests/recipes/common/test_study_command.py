"""The command of a study: run or report, and what it tells of failures."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from recipes.common.errors import RecipeError
from recipes.common.study_command import run_study
from recipes.common.study_settings import StudySettings


@dataclass(frozen=True, kw_only=True)
class Settings(StudySettings):
    preset: str = "small"
    output_dir: str = "runs/study"


def steps(done, error=None):
    def act(what):
        def step(given):
            done.append((what, given))
            if error is not None:
                raise error
            return given / "report.md" if what == "report" else None

        return step

    return lambda: (act("run"), act("report"))


def test_a_study_is_run_or_only_reported(tmp_path, capsys):
    done = []
    (tmp_path / "report.md").write_text("the report")
    settings = Settings()
    assert run_study(settings, steps(done)) == 0
    assert run_study(Settings(report=str(tmp_path)), steps(done)) == 0
    assert done == [("run", settings), ("report", tmp_path)]
    assert capsys.readouterr().out == "the report\n"


@pytest.mark.parametrize(("sentence", "told"), [("the folder is in use", "error: the folder is in use\n"), ("", "")])
def test_an_error_is_told_in_one_line_by_the_rank_that_has_it(capsys, sentence, told):
    assert run_study(Settings(), steps([], RecipeError(sentence))) == 1
    assert capsys.readouterr().err == told
