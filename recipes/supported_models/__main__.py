"""Compare the model families of transformers and of this library with a dense oracle on tiny models."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipes.common.cli import UsageError, command, parse
from recipes.supported_models.settings import SurveySettings

PROGRAM = "python -m recipes.supported_models"
DESCRIPTION = """\
Compare every mixture-of-experts family of the installed transformers, and of this library, with a dense oracle on a
tiny model with random weights.

  python -m recipes.supported_models
      all families; some minutes on 2 cores
  python -m recipes.supported_models --families qwen2_moe,mixtral
  python -m recipes.supported_models --write docs/supported_models.md
      (puts the table between `<!-- supported models -->` and `<!-- end of supported models -->`)
"""


@command
def main(arguments: Sequence[str]) -> int:
    """Print the table; returns the exit status: 0, 1 (a family fails) or 2 (wrong usage)."""
    settings = parse(SurveySettings, arguments, program=PROGRAM, description=DESCRIPTION)
    # Imported late: torch and transformers take seconds, and --help should not.
    from recipes.common.output_flags import place_filled
    from recipes.supported_models.catalogue import families
    from recipes.supported_models.report import PLACE, section, surveyed

    known = families()
    if unknown := sorted(set(settings.families) - set(known)):
        raise UsageError(f"no MoE family of the installed transformers or this library: {', '.join(unknown)}")
    rows = list(surveyed(sorted(set(settings.families)) or known))
    print(section(rows))
    failed = [row.family for row in rows if row.complaint is not None]
    if failed:
        print(f"error: {len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0 if place_filled(settings.write, PLACE, section(rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
