"""One job of a study of routers, in a process that `recipes.common.jobs` starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

from recipes.common.worker import described_job, do_job
from recipes.routers.settings import RouterSettings

Step = Literal["pretraining", "home", "all_layers", "some_layers"]
"""Steps of a seed, in order: pre-training its small model; its run, tested on its own data set; the same tested on the
others, and the stability of its routes; its rows of some layers."""


def worker_arguments(settings: RouterSettings, seed: int, step: Step) -> tuple[str, ...]:
    """The arguments of the interpreter for one job.

    Args:
        settings: Settings of the study.
        seed: Seed of the run.
        step: What to do of it.
    """
    return ("-m", "recipes.routers.worker", described_job(settings, seed=seed, step=step))


def main(description: str) -> int:
    """Do one job; returns the exit status as `recipes.routers` does.

    Args:
        description: JSON as in `worker_arguments`.
    """
    return do_job(description, RouterSettings, _do)


def _do(settings: RouterSettings, job: Mapping[str, Any]) -> None:
    from recipes.routers.run import complete_seed

    complete_seed(settings, job["seed"], job["step"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
