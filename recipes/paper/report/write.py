"""The files of a report: `report.md`, `results.json`, and a file for each table and figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bmoe_lightning.report import SummarySettings
from recipes.common.report_parts import write_sections
from recipes.paper.outcomes import Study
from recipes.paper.report.attribution import Attributed
from recipes.paper.report.compared import Compared, read_compared
from recipes.paper.report.costs import Costs
from recipes.paper.report.published import Published, read_published
from recipes.paper.report.section import ReportInput
from recipes.paper.report.sections import SECTIONS

_SECOND = {2, 4, 7}
_PAIRS = (
    "Tables 1 and 2, 3 and 4, and 6 and 7 are the same tables for two models: a study has one model, so that both "
    "numbers of a pair give one table here, and the other is that of a study with another `--preset` or `--model`."
)


def write_report(
    output: Path,
    study: Study,
    *,
    costs: Costs | None = None,
    attribution: Attributed | None = None,
    settings: SummarySettings | None = None,
    compared: Compared | None = None,
    published: Published | None = None,
) -> list[Path]:
    """Write the report of a study; the same study gives the same bytes.

    The first file, `report.md`, is the text to print. Tables are in `tables`, in Markdown and LaTeX, and figures in
    `figures`, which need matplotlib. Tables and figures of an earlier report that this one does not have are removed.

    Args:
        output: Folder, created if missing.
        study: Outcomes.
        costs: Costs of the rows; None if they were not measured.
        attribution: Where the variance of one method's predictions comes from; None if it was not made.
        settings: ECE convention and bootstrap; defaults if None.
        compared: Methods that are known by name, and claims; those of `compared.yaml` if None.
        published: Numbers of a publication; those of `published.json` if None.

    Returns:
        The files, `report.md` first.

    Raises:
        ValueError: If the study has no outcomes, or results cannot be compared; see `by_method`.
    """
    if not study.outcomes:
        raise ValueError("the study has no outcomes to report; run it first")
    report = ReportInput(
        study=study,
        compared=read_compared() if compared is None else compared,
        published=read_published() if published is None else published,
        costs=costs,
        attribution=attribution,
        settings=settings or SummarySettings(),
    )
    sections = [section for make in SECTIONS if (section := make(report)) is not None]
    pairs = f" {_PAIRS}" if _SECOND & set(study.tables) else ""
    introduction = f"Preset `{study.preset}`. {conventions(report.settings)}{pairs}{made_with(study)}"
    return write_sections(output, f"Results: {study.model}", introduction, sections, description(report))


def conventions(settings: SummarySettings) -> str:
    """Sentences on what the tables print.

    Args:
        settings: ECE convention.
    """
    return (
        "±: standard deviation over seeds (n - 1). **Bold**: best of a column, <u>underlined</u>: second best, as "
        f"printed. NLL in nats. ECE: {settings.ece_convention()}."
    )


def made_with(study: Study) -> str:
    """A paragraph on the versions that a study was made with; empty if they are not known.

    Args:
        study: The study.
    """
    if not study.versions:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in study.versions.items())
    return f"\n\nMade with {versions}. `results.json` has the digests of data, weights, posteriors and fits."


def description(report: ReportInput) -> dict[str, Any]:
    """What a report is about, for its `results.json`.

    Args:
        report: What the report is made from.
    """
    study, settings = report.study, report.settings
    return {
        "preset": study.preset,
        "model": study.model,
        "home": study.home,
        "data": study.labels,
        "ece_convention": settings.ece_convention(),
        "num_resamples": settings.num_samples,
        "level": settings.level,
        "bootstrap_seed": settings.bootstrap_seed,
        "versions": study.versions,
        "hashes": study.hashes,
    }
