"""What makes results doubtful, as their methods and runs say."""

from __future__ import annotations

from recipes.paper.report.section import ReportInput, Section

_TITLE = "Warnings"


def section(report: ReportInput) -> Section | None:
    """Each distinct warning, with the results that it is about; None if there are none.

    Args:
        report: What the report is made from.
    """
    study = report.study
    found: dict[str, dict[str, list[int]]] = {}
    for outcome in study.outcomes:
        for result in outcome.results:
            for sentence in result.warnings:
                where = (
                    f"{result.label}{' (LoRA)' if outcome.mode == 'lora' else ''}, trained on "
                    f"{report.label(outcome.trained_on)}, tested on {report.label(outcome.tested_on)}"
                )
                found.setdefault(sentence, {}).setdefault(where, []).append(result.seed)
    if not found:
        return None
    lines = [
        f"- {sentence}\n" + "\n".join(f"    - {where}: {_seeds(seeds)}" for where, seeds in places.items())
        for sentence, places in found.items()
    ]
    return Section(_TITLE, text=("\n".join(lines),), details={"warnings": found})


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}"
