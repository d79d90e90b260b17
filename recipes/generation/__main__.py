"""Compare scores of uncertainty on generated tasks with right and wrong answers in text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.common.cli import command, parse
from recipes.common.signals import run_until_stopped
from recipes.generation.settings import GenerationSettings

PROGRAM = "python -m recipes.generation"
DESCRIPTION = """\
Which score finds wrong answers in generated text. Trains small mixtures of experts on generated tasks whose answers are
several tokens, lets them answer, and compares the probability of the answer, the entropy of its tokens, and the
variance of its log-probability under the posterior, with and without curvature, by prediction rejection ratio and AUROC
of wrong answers against right ones.

  python -m recipes.generation --output-dir FOLDER
      two tasks, three seeds; a few minutes on two cores
  python -m recipes.generation --output-dir FOLDER --fisher empirical
      with the curvature of the training answers in place of sampled ones

The folder has report.md, results.json, the scores of every answer, and events for TensorBoard. A run that was stopped
resumes with the first model that is missing.
"""


@command
def main(arguments: Sequence[str]) -> int:
    """Run the comparison; returns the exit status.

    0, 1 (failed, with the reason on stderr), 2 (wrong usage), or 143 or 130 (stopped by SIGTERM or SIGINT).
    """
    settings = parse(GenerationSettings, arguments, program=PROGRAM, description=DESCRIPTION).resolved()
    return run_until_stopped(lambda: _run(settings), "finished models are stored; the same command resumes")


def _run(settings: GenerationSettings) -> int:
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)  # before anything is trained
    # Imported late: torch and transformers take seconds, and --help should not.
    from bmoe_lightning.report import SummarySettings
    from recipes.generation.comparison import compare
    from recipes.generation.experiment import all_answers
    from recipes.generation.report import write_report

    answers = list(all_answers(settings))
    comparisons = compare(answers, SummarySettings(num_samples=settings.num_samples))
    print(f"\n{write_report(answers, comparisons, settings).read_text(encoding='utf-8')}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
