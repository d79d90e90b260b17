"""The files of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from recipes.common.report_parts import Section, write_sections
from recipes.paper.report import all_metrics, reliability, warned
from recipes.paper.report.write import conventions, description, made_with
from recipes.routers.report import benefit, calibration, cost, layers, shift, stability
from recipes.routers.report.section import RouterReport

SECTIONS: tuple[Callable[[RouterReport], Section | None], ...] = (
    calibration.section,
    benefit.section,
    stability.section,
    shift.section,
    layers.section,
    cost.section,
    shift.tables,
    lambda report: reliability.section(report.given),
    lambda report: all_metrics.section(report.given),
    lambda report: warned.section(report.given),
)
"""From what a report is made from to a section; None for one that there is nothing for."""


def write_report(output: Path, report: RouterReport) -> list[Path]:
    """Write the report of a study; the same study gives the same bytes. See `write_sections`.

    Args:
        output: Folder, created if missing.
        report: What it is made from.

    Returns:
        The files, `report.md` first.
    """
    study, routes = report.given.study, report.routes
    sections = [section for make in SECTIONS if (section := make(report)) is not None]
    introduction = f"{len(routes.layers)} expert layers. {conventions(report.given.settings)}{made_with(study)}"
    content = {**description(report.given), "susceptible_layers": routes.susceptible, "layers": routes.layers}
    return write_sections(output, f"Experts or routers? {study.model}", introduction, sections, content)
