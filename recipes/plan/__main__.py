"""Memory and compute of a run before anything is downloaded, and which accelerators it fits."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipes.common.cli import command, parse
from recipes.plan.settings import PlanSettings

DESCRIPTION = """\
Plan a run for a mixture-of-experts language model from its configuration alone, without its weights.

  python -m recipes.plan --model qwen1.5-moe-a2.7b --memory 24,40,80,141
  python -m recipes.plan --model path/to/config.json --rank 20 --json plan.json
  python -m recipes.plan --model owner/name            (asks the hub for the configuration)
  python -m recipes.plan --model qwen1.5-moe-a2.7b --memory 24,40,80,141 --write docs/several_devices.md
      (puts the launch lines between `<!-- launch lines -->` and `<!-- end of launch lines -->`)
"""


@command
def main(arguments: Sequence[str]) -> int:
    """Print the plan; returns the exit status: 0, 1 (failed, with the reason on stderr) or 2 (wrong usage)."""
    settings = parse(PlanSettings, arguments, program="python -m recipes.plan", description=DESCRIPTION)
    # Imported late: torch and transformers take seconds, and --help should not.
    from bmoe_lightning.models.loading import ModelUnavailableError
    from recipes.common.output_flags import json_written, place_filled
    from recipes.plan.report import PLACE, launch_section, make_plan, plan_json, plan_text

    try:
        plan = make_plan(settings)
    except (ModelUnavailableError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(plan_text(plan))
    filled = place_filled(settings.write, PLACE, launch_section(plan))
    return 0 if json_written(settings.json, plan_json(plan)) and filled else 1


if __name__ == "__main__":
    sys.exit(main())
