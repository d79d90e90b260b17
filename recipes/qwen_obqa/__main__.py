"""Fine-tune a mixture of experts on multiple-choice questions, then compare the calibration of several methods."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

from bmoe_lightning.methods.registry import method_names
from recipes.common.cli import command, parse
from recipes.common.signals import run_until_stopped
from recipes.common.study_command import reported
from recipes.qwen_obqa.method_names import check_names
from recipes.qwen_obqa.settings import ResolvedSettings, Settings

PROGRAM = "python -m recipes.qwen_obqa"
DESCRIPTION = """\
Fine-tune the experts of a mixture-of-experts language model on multiple-choice questions, then compare the calibration
of its answers: plain (MAP), MC dropout, ensembles, temperature scaling, and a Laplace posterior over the experts.

  python -m recipes.qwen_obqa
      a small built-in model and a generated task; no network, a few minutes on 2 cores
  python -m recipes.qwen_obqa --data FOLDER
      the small model on real questions (train.jsonl and test.jsonl in the hub's columns)
  python -m recipes.qwen_obqa --model Qwen/Qwen1.5-MoE-A2.7B --data allenai/openbookqa
      the paper's set-up, on a GPU; local folders work for both
  python -m recipes.qwen_obqa --methods all,their_module:Mine --set mine.OPTION=VALUE --curvature.rank 16
      a method from another module, options of methods, and the default curvature
  torchrun --nproc-per-node 8 -m recipes.qwen_obqa --model Qwen/Qwen1.5-MoE-A2.7B --strategy sharded
      on several GPUs; `python -m recipes.plan --model qwen1.5-moe-a2.7b` has the launch lines and what they need
"""


@command
def main(arguments: Sequence[str]) -> int:
    """Run the recipe; returns the exit status.

    0, 1 (failed, with the reason on stderr), 2 (wrong usage), or 143 or 130 (stopped by SIGTERM or SIGINT).
    """
    registered = textwrap.fill(f"Registered methods: {', '.join(method_names())}.", 116)
    description = f"{DESCRIPTION}\n{registered}"
    settings = parse(Settings, arguments, program=PROGRAM, description=description).resolved()
    check_names(settings)
    told = (
        f"finished stages and the sums of a curvature pass are stored in {settings.output_dir}; run the same command "
        "again to resume"
    )
    return run_until_stopped(lambda: _run(settings), told)


def _run(settings: ResolvedSettings) -> int:
    # Imported late: torch and transformers take seconds, and --help should not.
    from recipes.qwen_obqa.experiment import run

    return reported(lambda: run(settings))


if __name__ == "__main__":
    sys.exit(main())
