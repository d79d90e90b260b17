"""The tables and figures of the paper, each by one command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from recipes.common.cli import command, parse
from recipes.common.study_command import run_study
from recipes.paper.settings import PaperSettings

PROGRAM = "python -m recipes.paper"
DESCRIPTION = """\
The experiments of Bayesian Mixture of Experts (https://arxiv.org/abs/2511.08968), on any model.

  Tables 1, 2   all methods on every data set, in distribution
  Tables 3, 4   trained on the first data set, tested on the others
  Table 5, Figure 1   a posterior that leaves out one of four parts of the layers
  Tables 6, 7   prior precision from the evidence (LA) and from validation (LA + LPO)

The second number of each pair is the paper's second model, hence another --preset. A model that several tables need is
trained once, and a command that was stopped resumes where it was.

  python -m recipes.paper --all
      the small model on generated questions, five seeds; no network
  python -m recipes.paper --table 1,3 --data openbookqa=FOLDER,arc_easy=FOLDER --protocol holdout
      the small model on real questions
  python -m recipes.paper --all --preset qwen
      the paper's set-up, on a GPU
  python -m recipes.paper --report runs/paper
      the report of a finished study again, without a model
"""


@command
def main(arguments: Sequence[str]) -> int:
    """Run the experiments; returns the exit status as `recipes.qwen_obqa` does."""
    settings = parse(PaperSettings, arguments, program=PROGRAM, description=DESCRIPTION)
    return run_study(settings, _steps)


def _steps() -> tuple[Callable[[PaperSettings], object], Callable[[Path], Path]]:
    from recipes.paper.run import report, run

    return run, report


if __name__ == "__main__":
    sys.exit(main())
