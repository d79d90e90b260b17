"""Random routers beside posteriors over experts, with controls, by one command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.common.cli import command, parse
from recipes.common.signals import run_until_stopped
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
    if settings.report is None:
        told = f"finished stages are stored in {settings.output_dir}; run the same command again to resume"
    else:
        told = f"the report in {Path(settings.report) / 'report'} may be incomplete; run the same command again"
    return run_until_stopped(lambda: _run(settings), told)


def _run(settings: RouterSettings) -> int:
    # Imported late: torch and transformers take seconds, and --help should not.
    from recipes.qwen_obqa.sources import RecipeError
    from recipes.routers.run import report, run

    try:
        if settings.report is not None:
            report(Path(settings.report))
        else:
            run(settings)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
