"""What makes results doubtful, as their methods and runs say."""

from __future__ import annotations

from bmoe_lightning.report.alike import alike, told_once
from recipes.common.report_parts import Section
from recipes.paper.report.section import ReportInput

_TITLE = "Warnings"


def section(report: ReportInput) -> Section | None:
    """The warnings, with the models and methods that they are about; None if there are none.

    Warnings that differ in numbers alone are one, with the numbers of the first; `results.json` has those of all.

    Args:
        report: What the report is made from.
    """
    found: dict[str, list[dict[str, str | int]]] = {}
    methods: dict[str, set[str]] = {}
    for outcome in report.study.outcomes:
        model = f"trained on {report.label(outcome.trained_on)}{' (LoRA)' if outcome.mode == 'lora' else ''}"
        for result in outcome.results:
            methods.setdefault(model, set()).add(result.label)
            for sentence in result.warnings:
                place: dict[str, str | int] = {
                    "model": model,
                    "method": result.label,
                    "seed": result.seed,
                    "tested_on": outcome.tested_on,
                }
                found.setdefault(sentence, []).append(place)
    if not found:
        return None
    text = "\n".join(
        f"- {told_once(sentences)}\n{_places([place for sentence in sentences for place in found[sentence]], methods)}"
        for sentences in alike(found)
    )
    return Section(_TITLE, text=(text,), details={"warnings": found})


def _places(places: list[dict[str, str | int]], methods: dict[str, set[str]]) -> str:
    """A line a model: seeds, and methods unless they are all that were fitted to it."""
    lines = []
    for model in dict.fromkeys(str(place["model"]) for place in places):
        of_model = [place for place in places if place["model"] == model]
        seeds = sorted({int(place["seed"]) for place in of_model})
        names = list(dict.fromkeys(str(place["method"]) for place in of_model))
        listed = "all methods" if set(names) == methods[model] else ", ".join(names)
        lines.append(f"    - {model}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}: {listed}")
    return "\n".join(lines)
