"""What a run would take, before anything is downloaded: experts, factors, operations, and which accelerator it fits."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

DESCRIPTION = """\
Plan a run for a mixture-of-experts language model from its configuration alone: no weights are read, none are made.

  python -m recipes.plan --model qwen1.5-moe-a2.7b --memory 24,40,80,141
  python -m recipes.plan --model path/to/config.json --rank 20 --json plan.json
  python -m recipes.plan --model owner/name            (asks the hub for the configuration)
  python -m recipes.plan --model qwen1.5-moe-a2.7b --memory 24,40,80,141 --readme    (puts its launch lines there)
"""


class _UsageError(ValueError):
    """A flag has an impossible value."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit status: 0, 1 (it failed, with a sentence why) or 2 (wrong usage)."""
    flags = _parser().parse_args(arguments)
    try:
        _check(flags)
    except _UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Late: torch and transformers take seconds to import, and --help should not.
    from bmoe_lightning.models.loading import ModelUnavailableError
    from recipes.common.json_flag import written
    from recipes.common.readme import README, between
    from recipes.plan.report import PlanSettings, launch_section, make_plan, plan_json, plan_text

    settings = PlanSettings(**{name: value for name, value in vars(flags).items() if name not in ("json", "readme")})
    try:
        plan = make_plan(settings)
    except (ModelUnavailableError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(plan_text(plan))
    if flags.readme:
        text = README.read_text(encoding="utf-8")
        README.write_text(between(text, "launch lines", launch_section(plan)), encoding="utf-8")
    return 0 if flags.json is None or written(flags.json, plan_json(plan)) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.plan",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", required=True, help="config.json, a folder with one, qwen1.5-moe-a2.7b, deepseek-moe-16b or a hub id"
    )
    numbers = (
        ("--examples", 4957, "training questions, over which the curvature is taken"),
        ("--calibration-examples", 500, "questions that a prior precision or temperature is fitted on"),
        ("--tokens", 256, "tokens of a question, without padding"),
        ("--batch-size", 8, "of training, curvature and prediction"),
        ("--classes", 4, "choices of a question"),
        ("--rank", 10, "eigenpairs kept of each Kronecker factor"),
    )
    for flag, default, text in numbers:
        parser.add_argument(flag, type=int, default=default, metavar="INT", help=f"{text} (default: {default})")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the weights (default: bfloat16)"
    )
    parser.add_argument(
        "--memory",
        type=_memory_sizes,
        default=(80.0,),
        metavar="GIB",
        help="of the accelerator; several: 24,40,80,141 (default: 80)",
    )
    parser.add_argument(
        "--experts-per-token", type=int, default=None, metavar="INT", help="where the configuration does not name it"
    )
    parser.add_argument("--readme", action="store_true", help="also put the launch lines into README.md")
    parser.add_argument("--json", default=None, metavar="FILE", help="also write the figures as JSON")
    return parser


def _memory_sizes(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers of GiB such as 24,80, got {text!r}") from None


def _check(flags: argparse.Namespace) -> None:
    """Refuse values that mean nothing."""
    least = {"examples": 1, "calibration_examples": 1, "tokens": 1, "batch_size": 1, "classes": 2, "rank": 1}
    for name, lowest in {**least, "experts_per_token": 1}.items():
        value = getattr(flags, name)
        if value is not None and value < lowest:
            raise _UsageError(f"--{name.replace('_', '-')} must be at least {lowest}, got {value}")
    if not all(0 < size < math.inf for size in flags.memory):
        raise _UsageError(f"--memory must be numbers of GiB above 0, got {','.join(f'{x:g}' for x in flags.memory)}")


if __name__ == "__main__":
    sys.exit(main())
