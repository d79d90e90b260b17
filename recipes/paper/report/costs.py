"""What each method costs, relative to the reference."""

from __future__ import annotations

from dataclasses import dataclass

from bmoe_lightning.report import Cell, Grid, GridBlock, GridRow, NumberFormat
from recipes.paper.report.section import ReportInput, Section

_TITLE = "Cost"
_COLUMNS = ("fit time", "prediction time", "fit memory", "prediction memory")


@dataclass(frozen=True)
class Cost:
    """What a method costs beyond training; None for what was not measured.

    Attributes:
        fit_seconds: Time of its fit.
        predict_seconds: Time of its predictions on the test split.
        fit_bytes: Peak memory of its fit.
        predict_bytes: Peak memory of its predictions.
    """

    fit_seconds: float | None = None
    predict_seconds: float | None = None
    fit_bytes: float | None = None
    predict_bytes: float | None = None


def section(report: ReportInput) -> Section | None:
    """Costs relative to those of the reference's predictions; None without results.

    Args:
        report: What the report is made from.
    """
    home = report.study.home
    labels = {row: group[0].label for row, group in report.groups(home, home).items()}
    labels = {row: label for row, label in labels.items() if row in report.costs}
    base = report.costs.get(report.compared.reference)
    if base is None or not labels or (base.predict_seconds is None and base.predict_bytes is None):
        return Section(_TITLE, text=("Not measured.",))
    reference = labels.get(report.compared.reference, report.compared.reference)
    units = (base.predict_seconds, base.predict_seconds, base.predict_bytes, base.predict_bytes)
    rows = []
    for row, label in labels.items():
        cost = report.costs[row]
        values = (cost.fit_seconds, cost.predict_seconds, cost.fit_bytes, cost.predict_bytes)
        cells = [
            None if value is None or not unit else Cell(value / unit) for value, unit in zip(values, units, strict=True)
        ]
        rows.append(GridRow(row, label, tuple(cells)))
    caption = (
        f"{report.study.model}: time and peak memory of fit and prediction, relative to the predictions of {reference} "
        f"on the test split ({_words(base)}). A dash is what was not measured."
    )
    format = NumberFormat(digits=2)
    return Section(
        _TITLE, grids=(Grid("costs", caption, "method", _COLUMNS, (GridBlock("", (format,) * 4, tuple(rows)),)),)
    )


def _words(base: Cost) -> str:
    parts = []
    if base.predict_seconds is not None:
        parts.append(f"{base.predict_seconds:.3g} s")
    if base.predict_bytes is not None:
        parts.append(f"{base.predict_bytes / 2**20:.0f} MiB")
    return ", ".join(parts)
