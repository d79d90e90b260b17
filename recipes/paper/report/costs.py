"""What each method costs, relative to the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from bmoe_lightning.report import Cell, Grid, GridBlock, GridRow, NumberFormat
from recipes.paper.report.section import ReportInput, Section

_TITLE = "Cost"
_UNMEASURED = (
    "Not measured. Run the command that made the study again: it repeats no finished run, and measures the costs."
)
_COLUMNS = ("fit time", "prediction time", "fit memory", "prediction memory", "latency", "further fine-tunings")
_FORMATS = (*(NumberFormat(digits=2),) * 5, NumberFormat(digits=0))


@dataclass(frozen=True)
class Cost:
    """What a method costs beyond training; None for what was not measured, and for the fit of one that has none.

    Attributes:
        fit_seconds: Time of its fit.
        predict_seconds: Time of its predictions on test questions.
        fit_bytes: Peak memory of its fit, with the model.
        predict_bytes: Peak memory of its predictions, with the model and what was fitted.
        latency_seconds: Time of the prediction of one question alone, the median.
        further_runs: Number of further fine-tuning runs whose weights it predicts with, which no time includes.
    """

    fit_seconds: float | None = None
    predict_seconds: float | None = None
    fit_bytes: float | None = None
    predict_bytes: float | None = None
    latency_seconds: float | None = None
    further_runs: int = 0


@dataclass(frozen=True)
class Costs:
    """What the methods of a study cost.

    Attributes:
        rows: Costs by row; see `row_of`.
        measured_on: Sentences on what was measured, and where; empty for none.
        left_out: Sentences on what was not measured, and why; empty for none.
    """

    rows: Mapping[str, Cost] = field(default_factory=dict)
    measured_on: str = ""
    left_out: str = ""


def section(report: ReportInput) -> Section | None:
    """Costs relative to those of the reference's predictions; None without results.

    Args:
        report: What the report is made from.
    """
    home, costs = report.study.home, report.costs or Costs()
    labels = {row: group[0].label for row, group in report.groups(home, home).items() if row in costs.rows}
    base = costs.rows.get(report.compared.reference)
    if base is None or not labels or (base.predict_seconds is None and base.predict_bytes is None):
        return Section(_TITLE, text=(f"Not measured. {costs.left_out}" if costs.left_out else _UNMEASURED,))
    reference = labels.get(report.compared.reference, report.compared.reference)
    rows = [GridRow(row, label, _cells(costs.rows[row], base)) for row, label in labels.items()]
    measured_on = f" {costs.measured_on}" if costs.measured_on else ""
    caption = (
        f"{report.model}: time and peak memory of fit and prediction, and the time of the prediction of one "
        f"question alone, relative to the predictions of {reference} on the same questions ({_words(base)}); memory "
        f"includes the model. Further fine-tunings are counted, and not part of the times. A dash: nothing to fit, or "
        f"not measured.{measured_on}"
    )
    grid = Grid("costs", caption, "method", _COLUMNS, (GridBlock("", _FORMATS, tuple(rows)),))
    details = {row: asdict(costs.rows[row]) for row in labels}
    return Section(
        _TITLE, grids=(grid,), text=(costs.left_out,) if costs.left_out else (), details={"measured_costs": details}
    )


def _cells(cost: Cost, base: Cost) -> tuple[Cell | None, ...]:
    relative = (
        (cost.fit_seconds, base.predict_seconds),
        (cost.predict_seconds, base.predict_seconds),
        (cost.fit_bytes, base.predict_bytes),
        (cost.predict_bytes, base.predict_bytes),
        (cost.latency_seconds, base.latency_seconds),
    )
    cells = [None if value is None or not unit else Cell(value / unit) for value, unit in relative]
    return (*cells, Cell(cost.further_runs))


def _words(base: Cost) -> str:
    parts = []
    if base.predict_seconds is not None:
        parts.append(f"{base.predict_seconds:.3g} s")
    if base.predict_bytes is not None:
        parts.append(f"{base.predict_bytes / 2**20:.0f} MiB")
    if base.latency_seconds is not None:
        parts.append(f"{1000 * base.latency_seconds:.3g} ms a question")
    return ", ".join(parts)
