"""The registry of the report's sections, in their order: a new one is a file with such a function, and a line here."""

from __future__ import annotations

from collections.abc import Callable

from recipes.common.report_parts import Section
from recipes.paper.report import (
    all_metrics,
    attribution,
    bars,
    by_warning,
    costs,
    detection,
    in_distribution,
    layers,
    prior,
    reliability,
    shift,
    warned,
)
from recipes.paper.report.section import ReportInput

SECTIONS: tuple[Callable[[ReportInput], Section | None], ...] = (
    in_distribution.section,
    shift.section,
    layers.section,
    attribution.section,
    prior.section,
    bars.section,
    by_warning.section,
    detection.section,
    costs.section,
    reliability.section,
    all_metrics.section,
    warned.section,
)
"""From what a report is made from to a section; None for one that was not asked for."""
