"""One job of a study, in a process that `recipes.common.jobs` starts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from recipes.common.worker import described_job, do_job
from recipes.paper.settings import PaperSettings


def worker_arguments(settings: PaperSettings, *, run: str | None = None, seed: int | None = None) -> tuple[str, ...]:
    """The arguments of the interpreter for one job.

    Args:
        settings: Settings of the study.
        run: Name of the run to complete; None to pre-train the small model of a seed.
        seed: That seed.
    """
    return ("-m", "recipes.paper.worker", described_job(settings, run=run, seed=seed))


def main(description: str) -> int:
    """Do one job; returns the exit status as `recipes.paper` does.

    Args:
        description: JSON as in `worker_arguments`.
    """
    return do_job(description, PaperSettings, _do)


def _do(settings: PaperSettings, job: Mapping[str, Any]) -> None:
    from recipes.paper.run import complete_one, pretrain_one

    if job["run"] is not None:
        complete_one(settings, job["run"])
    elif job["seed"] is not None:
        pretrain_one(settings, job["seed"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
