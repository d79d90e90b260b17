"""Measure the regret of each method, and of each rule for a temperature, against the number of held-out labels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.calibration_study.settings import StudySettings
from recipes.common.cli import UsageError, command, parse

PROGRAM = "python -m recipes.calibration_study"
DESCRIPTION = """\
Which method to use with few held-out labels. Fine-tunes small models on the built-in task (normally, until they
memorise, so that they learn nothing, with a third of the labels at random, and calibrated already) and on real
questions, and measures

  temperatures: test NLL above that of the best temperature, by rule and number of labels
  split sizes:  test NLL above the better of MAP and temperature scaling, by method and size of the calibration split

in thousandths of a nat, as `mean (worst case)`. Each fine-tuned model predicts once; the fits are arithmetic on what is
stored. Some 40 seconds of one core for each fine-tuning and all its fits.

  python -m recipes.calibration_study --config recipes/calibration_study/compared.yaml --seeds 3 --label-draws 5 \\
      --data FOLDER,FOLDER
      what docs/reading_the_results.md shows: the variants of the posterior's prior precision too
"""


@command
def main(arguments: Sequence[str]) -> int:
    """Run the study; returns the exit status: 0, 1 (failed, with the reason on stderr) or 2 (wrong usage)."""
    settings = parse(StudySettings, arguments, program=PROGRAM, description=DESCRIPTION)
    # Imported late: torch and transformers take seconds, and --help should not.
    from bmoe_lightning.data import DataUnavailableError
    from bmoe_lightning.utils.atomic_io import write_text
    from recipes.calibration_study.cases import cases
    from recipes.calibration_study.report import split_tables, temperature_tables
    from recipes.calibration_study.split_sizes import measurable, split_regrets
    from recipes.calibration_study.temperatures import temperature_regrets
    from recipes.qwen_obqa.methods import build_methods
    from recipes.qwen_obqa.settings import Settings

    methods = [m for m in build_methods(Settings(methods=settings.methods).resolved()) if measurable(m)]
    if not methods:
        raise UsageError("--methods: each of them needs more than a fine-tuned model and its held-out questions")
    output = Path(settings.output_dir)
    try:
        made = list(cases(settings))
        temperatures = temperature_tables(temperature_regrets(made, settings.label_draws))
        regrets = split_regrets(made, methods, settings.split_sizes, settings.draws, output / "regrets")
    except (DataUnavailableError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    splits = split_tables(regrets, {method.name: method.label for method in methods})
    for name, table in (("temperatures", temperatures), ("split_sizes", splits)):
        write_text(output / f"{name}.md", table + "\n")
        print(f"\n{table}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
