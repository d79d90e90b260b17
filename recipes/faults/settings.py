"""Settings of the fault injection; torch and transformers are not imported here, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.common.cli import UsageError, option

Stage = Literal["kills", "disks", "read-only", "signals", "mutations"]
STAGES: tuple[Stage, ...] = ("kills", "disks", "read-only", "signals", "mutations")
SHARES = {"fit": 50, "killed pass": 15, "served model": 15, "adapters": 17, "run again": 3}
"""Percentages of the mutations; a command that is run again takes a hundred times as long as a file that is read."""
_PERCENTAGES = ", ".join(f"{share} % {kind}" for kind, share in SHARES.items())


@dataclass(frozen=True, kw_only=True)
class FaultSettings:
    """Settings of `python -m recipes.faults`.

    Raises:
        UsageError: If there is no stage, or `write` is set for a part of the table.
    """

    output_dir: str = option("runs/faults", "output folder; stages found there are not repeated")
    stages: tuple[Stage, ...] = option(STAGES, "stages, separated by commas")
    kills: int = option(100, "killed runs, half of the recipe and half of a Lightning script", least=0)
    disks: int = option(40, "runs on a disk that becomes full, likewise", least=0)
    read_only: int = option(12, "runs with a folder that cannot be written to", least=0)
    mutations: int = option(1000, f"mutated files, by kind: {_PERCENTAGES} (adapters need peft)", least=0)
    seed: int = option(0, "seed of places, times and mutations", least=0)
    overwrite: bool = option(False, "repeat finished stages")
    dry_run: bool = option(
        False,
        "at most 4 kills, 4 full disks, 2 folders, 6 signals and 60 mutations: what the test suite runs, in about 2 "
        "minutes of one core",
    )
    quiet: bool = option(False, "no progress bars")
    write: str | None = option(None, "also write the table to this markdown file: docs/faults.md")

    def __post_init__(self) -> None:
        if not self.stages:
            raise UsageError(f"--stages is empty; name some of {', '.join(STAGES)}")
        if self.write is not None and (set(self.stages) != set(STAGES) or self.dry_run):
            raise UsageError("--write needs the whole table; leave --stages and --dry-run out")

    @property
    def counts(self) -> dict[Stage, int | None]:
        """How many faults of each stage are injected; None for all that there are."""
        found: dict[Stage, int | None] = {
            "kills": self.kills,
            "disks": self.disks,
            "read-only": self.read_only,
            "signals": None,
            "mutations": self.mutations,
        }
        if not self.dry_run:
            return found
        most = {"kills": 4, "disks": 4, "read-only": 2, "signals": 6, "mutations": 60}
        return {stage: most[stage] if count is None else min(count, most[stage]) for stage, count in found.items()}
