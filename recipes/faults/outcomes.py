"""What came of the faults that were injected: counts by kind, and a line for each one that was not handled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmoe_lightning.utils.json_io import read_json_file, write_json_file
from recipes.common.report_parts import markdown_table

_FORMAT, _VERSION = "injected faults", 1
MEANINGS = {
    "finished": "the same command then finished with the same numbers",
    "refused": "one sentence says what was found, with the path",
    "no effect": "the same numbers",
    "repaired": "what the file held was made again, with the same numbers",
    "not reached": "the run ended as without a fault before this one came, however often another was drawn",
}
"""Outcomes that are no faults, and what they mean."""


@dataclass
class Outcome:
    """What came of the faults of one kind.

    Attributes:
        kind: What was done to what.
        counts: Number by outcome, one of `MEANINGS`.
        faults: A line for each that was not handled.
    """

    kind: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, outcome: str, fault: str = "") -> None:
        """Count one.

        Args:
            outcome: One of `MEANINGS`.
            fault: What was not handled; empty if all was.
        """
        if fault:
            self.faults.append(fault)
        else:
            self.counts[outcome] += 1

    def described(self) -> dict[str, Any]:
        """The outcome in values that JSON has."""
        return {"kind": self.kind, "counts": dict(self.counts), "faults": self.faults}

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Outcome:
        """The outcome that `described` describes."""
        return cls(described["kind"], Counter(described["counts"]), list(described["faults"]))

    @property
    def tried(self) -> int:
        """Number of faults that were drawn, also of those that were not reached."""
        return self.counts.total() + len(self.faults)


def faults_of(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each fault that was not handled."""
    return [f"{outcome.kind}: {fault}" for outcome in outcomes for fault in outcome.faults]


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts by kind, and in a last row of all, in Markdown."""
    names = [name for name in MEANINGS if any(outcome.counts[name] for outcome in outcomes)]
    whole = Outcome("all", sum((outcome.counts for outcome in outcomes), Counter()), faults_of(outcomes))
    rows = [
        [each.kind, str(each.tried), *(str(each.counts[name]) for name in names), str(len(each.faults))]
        for each in (*outcomes, whole)
    ]
    head = ["kind", "tried", *names, "faults"]
    return "\n\n".join([markdown_table(head, rows), " ".join(f"{n}: {MEANINGS[n]}." for n in names)])


def store(path: Path, settings: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write the outcomes of a finished stage.

    Args:
        path: Target path.
        settings: What they depend on, in values that JSON has.
        outcomes: The outcomes.

    Raises:
        OSError: If the file cannot be written.
    """
    content = {"settings": settings, "outcomes": [outcome.described() for outcome in outcomes]}
    write_json_file(path, format=_FORMAT, version=_VERSION, description=content)


def stored(path: Path, settings: dict[str, Any]) -> list[Outcome] | None:
    """The outcomes of a finished stage; None if there is none of these settings.

    Args:
        path: Path of `store`.
        settings: Settings of `store`.

    Raises:
        ValueError: If the file is damaged.
    """
    if not path.is_file():
        return None
    content = read_json_file(path, format=_FORMAT, version=_VERSION, remedy="delete it").description
    if content["settings"] != settings:
        return None
    return [Outcome.of(each) for each in content["outcomes"]]
