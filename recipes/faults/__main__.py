"""Inject faults into runs, and count what was not refused or finished with the same numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from recipes.common.cli import command, parse
from recipes.common.signals import run_until_stopped
from recipes.faults.settings import FaultSettings

PROGRAM = "python -m recipes.faults"
PLACE = "faults"
DESCRIPTION = """\
Inject faults into short runs of the main recipe and of a plain Lightning script with the callback: kills before file
operations and at random times, disks that become full, folders without permission to write, SIGTERM and SIGINT in each
stage, mutated files of every kind. After a fault the same command has to finish with the same numbers; a mutated file
has to be refused in a sentence that names it, or to change no number. All else is counted as a fault.

  python -m recipes.faults
      100 kills, 40 full disks, 12 folders, 18 signals, 1000 mutations: 20 to 30 minutes of one core
  python -m recipes.faults --dry-run
      4 kills, 4 full disks, 2 folders, 6 signals, 60 mutations: about 2 minutes of one core
  python -m recipes.faults --kills 400 --stages kills
  python -m recipes.faults --write docs/faults.md
      (puts the table between `<!-- faults -->` and `<!-- end of faults -->`)
"""


@command
def main(arguments: Sequence[str]) -> int:
    """Print the table; returns the exit status.

    0, 1 (a fault was found, or something fails without one), 2 (wrong usage), or 143 or 130 (stopped by a signal).
    """
    settings = parse(FaultSettings, arguments, program=PROGRAM, description=DESCRIPTION)
    told = f"finished stages are stored in {settings.output_dir}; run the same command again to resume"
    return run_until_stopped(lambda: _run(settings), told)


def _run(settings: FaultSettings) -> int:
    # Imported late: torch and transformers take seconds, and --help should not.
    from recipes.common.output_flags import place_filled
    from recipes.faults.outcomes import faults_of, table
    from recipes.faults.run import run

    outcomes = run(settings)
    print(table(outcomes))
    found = faults_of(outcomes)
    for fault in found:
        print(f"fault: {fault}", file=sys.stderr)
    return 0 if place_filled(settings.write, PLACE, table(outcomes)) and not found else 1


if __name__ == "__main__":
    sys.exit(main())
