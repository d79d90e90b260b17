"""The tables and figures of the paper, each by one command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.common.cli import command, parse
from recipes.common.signals import run_until_stopped
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
    if settings.report is None:
        told = f"finished stages are stored in {settings.output_dir}; run the same command again to resume"
    else:
        told = f"the report in {Path(settings.report) / 'report'} may be incomplete; run the same command again"
    return run_until_stopped(lambda: _run(settings), told)


def _run(settings: PaperSettings) -> int:
    # Imported late: torch and transformers take seconds, and --help should not.
    from recipes.paper.run import report, run
    from recipes.qwen_obqa.sources import RecipeError

    try:
        if settings.report is not None:
            report(Path(settings.report))
        else:
            run(settings)
    except RecipeError as error:
        if str(error):  # empty on all ranks but zero, which reports the error
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
