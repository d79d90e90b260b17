"""Reliability diagrams of all methods, a panel a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bmoe_lightning.report import MethodResult, SummarySettings, reliability_panels, summarise
from recipes.common.report_parts import NamedFigure, Section
from recipes.paper.report.section import ReportInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLE = "Reliability"


def section(report: ReportInput) -> Section | None:
    """A figure for each data set in distribution, and for each that the models of the first were tested on.

    Args:
        report: What the report is made from.
    """
    home = report.study.home
    runs = [(name, name) for name in report.study.labels] + [(home, name) for name in report.shifted]
    figures = []
    for trained, tested in runs:
        results = [result for group in report.groups(trained, tested).values() for result in group]
        if results:
            caption = f"Trained on {report.label(trained)}, tested on {report.label(tested)}."
            figures.append(_figure(f"reliability_{trained}_{tested}", caption, results, report.settings))
    return Section(_TITLE, linked_figures=tuple(figures)) if figures else None


def _figure(name: str, caption: str, results: Sequence[MethodResult], settings: SummarySettings) -> NamedFigure:
    def draw() -> Figure:
        # The panels show no intervals.
        return reliability_panels(results, summarise(results, replace(settings, num_samples=1)))

    return NamedFigure(name, caption, draw)
