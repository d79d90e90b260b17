"""What a process that does one job of a study is told: the settings of the study, and the job."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from recipes.common.cli import exit_status
from recipes.common.signals import run_until_stopped
from recipes.common.study_command import reported
from recipes.common.study_settings import StudySettings

S = TypeVar("S", bound=StudySettings)


def described_job(settings: StudySettings, **job: Any) -> str:
    """Settings and job as JSON.

    Args:
        settings: Settings of the study.
        job: What to do, in values that JSON has.
    """
    return json.dumps({"settings": asdict(settings), **job})


def do_job(description: str, kind: type[S], action: Callable[[S, Mapping[str, Any]], object]) -> int:
    """Do one job; returns the exit status as the command of a study does.

    Args:
        description: JSON as of `described_job`.
        kind: Class of the settings.
        action: Function of the settings and the job, which may raise `RecipeError`.
    """
    job = json.loads(description)
    given = job.pop("settings")
    values: dict[str, Any] = {
        entry.name: tuple(value) if isinstance(value := given[entry.name], list) else value for entry in fields(kind)
    }
    return exit_status(lambda: run_until_stopped(lambda: reported(lambda: action(kind(**values), job))))
