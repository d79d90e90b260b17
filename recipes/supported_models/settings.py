"""Options of the survey of model families; nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.common.cli import UsageError, option


@dataclass(frozen=True)
class SurveySettings:
    """Which families are surveyed, and what is written."""

    families: tuple[str, ...] = option((), "only these families, separated by commas; left out: all")
    write: str | None = option(None, "also write the table to this markdown file: docs/supported_models.md")

    def __post_init__(self) -> None:
        if self.write is not None and self.families:
            raise UsageError("--write takes all families; leave --families out")
