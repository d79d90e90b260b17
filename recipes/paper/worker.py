"""One job of a study, in a process that `recipes.paper.jobs` starts."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields
from typing import Any

from recipes.common.cli import exit_status
from recipes.common.signals import run_until_stopped
from recipes.paper.settings import PaperSettings


def worker_arguments(settings: PaperSettings, *, run: str | None = None, seed: int | None = None) -> tuple[str, ...]:
    """The arguments of the interpreter for one job.

    Args:
        settings: Settings of the study.
        run: Name of the run to complete; None to pre-train the small model of a seed.
        seed: That seed.
    """
    return ("-m", "recipes.paper.worker", json.dumps({"settings": asdict(settings), "run": run, "seed": seed}))


def main(description: str) -> int:
    """Do one job; returns the exit status as `recipes.paper` does.

    Args:
        description: JSON as in `worker_arguments`.
    """
    content = json.loads(description)
    values: dict[str, Any] = {
        entry.name: tuple(value) if isinstance(value := content["settings"][entry.name], list) else value
        for entry in fields(PaperSettings)
    }
    settings = PaperSettings(**values)
    return exit_status(lambda: run_until_stopped(lambda: _run(settings, content["run"], content["seed"])))


def _run(settings: PaperSettings, run: str | None, seed: int | None) -> int:
    from recipes.paper.run import complete_one, pretrain_one
    from recipes.qwen_obqa.sources import RecipeError

    try:
        if run is not None:
            complete_one(settings, run)
        elif seed is not None:
            pretrain_one(settings, seed)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
