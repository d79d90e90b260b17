"""Random routers beside posteriors over experts, with controls, by one command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from recipes.common.cli import command, parse
from recipes.common.study_command import run_study
from recipes.routers.settings import RouterSettings

PROGRAM = "python -m recipes.routers"
DESCRIPTION = """\
Uncertain routers (https://arxiv.org/abs/2509.23830, https://arxiv.org/abs/2603.09453) beside a posterior over experts,
on one model, with the controls that such a comparison needs.

  calibration    accuracy, NLL, ECE and MCE of all methods in distribution
  stability      how far the chosen experts change under noise on the input
  shift          in- against out-of-distribution questions, by every score of uncertainty
  layers         routers of some layers alone
  cost           counted operations and measured time

Methods that replace router logits are found in the registry. A command that was stopped resumes where it was.

  python -m recipes.routers
      the small model on generated questions, three seeds; no network
  python -m recipes.routers --preset granite
      Granite-3.1-3B-A800M-instruct, as in the papers, on a GPU
  python -m recipes.routers --report runs/routers
      the report of a finished study again, without a model
"""


@command
def main(arguments: Sequence[str]) -> int:
    """Run the study; returns the exit status as `recipes.qwen_obqa` does."""
    settings = parse(RouterSettings, arguments, program=PROGRAM, description=DESCRIPTION)
    return run_study(settings, _steps)


def _steps() -> tuple[Callable[[RouterSettings], object], Callable[[Path], Path]]:
    from recipes.routers.run import report, run

    return run, report


if __name__ == "__main__":
    sys.exit(main())
