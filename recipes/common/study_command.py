"""The command of a study of several runs: run it, or make its report again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from recipes.common.errors import RecipeError
from recipes.common.signals import run_until_stopped
from recipes.common.study_settings import StudySettings

S = TypeVar("S", bound=StudySettings)

Steps = Callable[[], tuple[Callable[[S], object], Callable[[Path], Path]]]
"""Imports and returns the functions that run a study, and that make its report and return the path of its text."""


def run_study(settings: S, steps: Steps[S]) -> int:
    """Run a study, or make its report again if the settings say so; returns the exit status.

    Args:
        settings: The settings.
        steps: Called late: torch and transformers take seconds to import, and `--help` should not.
    """
    if settings.report is None:
        told = f"finished stages are stored in {settings.output_dir}; run the same command again to resume"
    else:
        told = f"the report in {Path(settings.report) / 'report'} may be incomplete; run the same command again"
    return run_until_stopped(lambda: _run(settings, steps), told)


def _run(settings: S, steps: Steps[S]) -> int:
    run, report = steps()
    if settings.report is not None:
        folder = Path(settings.report)
        return reported(lambda: print(report(folder).read_text(encoding="utf-8"), flush=True))
    return reported(lambda: run(settings))


def reported(action: Callable[[], object]) -> int:
    """Do something, and report what a recipe cannot do; returns the exit status.

    Args:
        action: Function that may raise `RecipeError`.
    """
    try:
        action()
    except RecipeError as error:
        if str(error):  # empty on all ranks but zero, which reports the error
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
