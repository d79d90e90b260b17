"""The main job: fine-tune a mixture of experts on multiple-choice questions and compare how calibrated methods are."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipes.qwen_obqa.settings import SettingsError, parse_settings

DESCRIPTION = """\
Fine-tune the experts of a mixture-of-experts language model on multiple-choice questions, then compare the calibration
of its answers: plain (MAP), MC dropout, ensembles, temperature scaling, and a Laplace posterior over the experts.

  python -m recipes.qwen_obqa
      a small built-in model and a generated task; no network, under 3 minutes on 2 cores
  python -m recipes.qwen_obqa --data FOLDER
      the small model on real questions (train.jsonl and test.jsonl in the hub's columns)
  python -m recipes.qwen_obqa --model Qwen/Qwen1.5-MoE-A2.7B --data allenai/openbookqa
      the paper's set-up, on a GPU; local folders work for both
  torchrun --nproc-per-node 8 -m recipes.qwen_obqa --model Qwen/Qwen1.5-MoE-A2.7B --strategy sharded
      on several GPUs; `python -m recipes.plan --model qwen1.5-moe-a2.7b` has the launch lines and what they need
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit status: 0, 1 (it failed, with a sentence why) or 2 (wrong usage)."""
    try:
        settings = parse_settings(
            sys.argv[1:] if arguments is None else arguments,
            program="python -m recipes.qwen_obqa",
            description=DESCRIPTION,
        ).resolved()
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Late: torch and transformers take seconds to import, and --help should not.
    from recipes.qwen_obqa.experiment import RecipeError, run

    try:
        run(settings)
    except RecipeError as error:
        if str(error):  # of several processes the first one tells
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
