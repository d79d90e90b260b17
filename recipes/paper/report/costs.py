"""What each method costs, relative to the reference."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from bmoe_lightning.report import Cell, Grid, GridBlock, GridRow, NumberFormat
from recipes.common.report_parts import Section
from recipes.paper.outcomes import MODES
from recipes.paper.report.section import ReportInput, row_of

_TITLE = "Cost"
_UNMEASURED = (
    "Not measured. Run the command that made the study again: it repeats no finished run, and measures the costs."
)
_TIMES = {"fit": "fit time", "predict": "prediction time", "latency": "latency"}
_COLUMNS = ("fit time", "prediction time", "fit memory", "prediction memory", "latency", "further fine-tunings")
_FORMATS = (*(NumberFormat(digits=2),) * 5, NumberFormat(digits=0))
_WIDE = 1.25
_FEW = 8


@dataclass(frozen=True)
class Timing:
    """Times of an action, each with that of the reference's prediction in the same round.

    Attributes:
        seconds: Time of the action in each round, at least one.
        reference: Time of the reference's prediction in each round, above 0.
    """

    seconds: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median of the ratios of the rounds."""
        return statistics.median(self._ratios)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest ratio of a round; of more than eight rounds the quartiles."""
        ratios = self._ratios
        if len(ratios) <= _FEW:
            return min(ratios), max(ratios)
        low, _, high = statistics.quantiles(ratios, n=4)
        return low, high

    @property
    def _ratios(self) -> list[float]:
        return [own / reference for own, reference in zip(self.seconds, self.reference, strict=True)]


@dataclass(frozen=True)
class Cost:
    """What a method costs beyond training; None for what was not measured, and for the fit of one that has none.

    Attributes:
        fit: Time of its fit, and of the fits to the weights of further runs.
        predict: Time of its predictions on test questions.
        latency: Time of the prediction of one question alone, a round a question.
        fit_bytes: Peak memory of its fit, with the model.
        predict_bytes: Peak memory of its predictions, with the model and what was fitted.
        reference_bytes: Peak memory of the reference's predictions with the same model.
        further_runs: Number of further fine-tuning runs whose weights it predicts with, which no time includes.
    """

    fit: Timing | None = None
    predict: Timing | None = None
    latency: Timing | None = None
    fit_bytes: float | None = None
    predict_bytes: float | None = None
    reference_bytes: float | None = None
    further_runs: int = 0


@dataclass(frozen=True)
class Costs:
    """What the methods of a study cost.

    Attributes:
        rows: Costs by row; see `row_of`.
        measured_on: By row, sentences on what was measured, and where.
        left_out: Sentences on what was not measured, and why; empty for none.
    """

    rows: Mapping[str, Cost] = field(default_factory=dict)
    measured_on: Mapping[str, str] = field(default_factory=dict)
    left_out: str = ""


def section(report: ReportInput) -> Section | None:
    """Costs relative to those of the reference's predictions; None without results.

    Args:
        report: What the report is made from.
    """
    home, costs = report.study.home, report.costs or Costs()
    labels = {row: group[0].label for row, group in report.groups(home, home).items() if row in costs.rows}
    if not labels:
        return Section(_TITLE, text=(f"No costs. {costs.left_out}" if costs.left_out else _UNMEASURED,))
    rows = [GridRow(row, label, _cells(costs.rows[row])) for row, label in labels.items()]
    measured_on = "".join(
        f" {text}" for text in dict.fromkeys(costs.measured_on.get(row, "") for row in labels) if text
    )
    reference = report.compared.reference
    bases = [row for mode in MODES if (row := row_of(reference, mode)) in labels]
    absolute = "; ".join(f"{labels[row]}: {words}" for row in bases if (words := _words(costs.rows[row])))
    caption = (
        f"{report.model}: time and peak memory of fit and prediction, and the time of the prediction of one "
        f"question alone, relative to the predictions of {labels.get(reference, reference)} on the same questions with "
        f"the same model{f' ({absolute})' if absolute else ''}. A time is the median of its ratios to the time of "
        f"those predictions beside it; memory includes the model. Fit time includes a method's fits to further "
        f"fine-tuned weights; further fine-tunings are counted, and not part of the times. The members of an ensemble "
        f"are loaded once for all test questions, and before the question that is predicted alone. A dash: nothing to "
        f"fit, or not measured.{measured_on}"
    )
    grid = Grid("costs", caption, "method", _COLUMNS, (GridBlock("", _FORMATS, tuple(rows)),))
    details = {row: asdict(costs.rows[row]) for row in labels}
    wide = [text for row, label in labels.items() for text in _wide(label, costs.rows[row])]
    spread = f"Times whose ratios differ by more than a quarter between rounds: {'; '.join(wide)}." if wide else ""
    text = tuple(filter(None, (spread, costs.left_out)))
    return Section(_TITLE, grids=(grid,), text=text, details={"measured_costs": details})


def _cells(cost: Cost) -> tuple[Cell | None, ...]:
    def timed(timing: Timing | None) -> Cell | None:
        return None if timing is None else Cell(timing.ratio)

    def relative(value: float | None) -> Cell | None:
        return None if value is None or not cost.reference_bytes else Cell(value / cost.reference_bytes)

    memory = (relative(cost.fit_bytes), relative(cost.predict_bytes))
    return (timed(cost.fit), timed(cost.predict), *memory, timed(cost.latency), Cell(cost.further_runs))


def _wide(label: str, cost: Cost) -> Iterator[str]:
    """Range of each time of a row whose rounds disagree."""
    for name, words in _TIMES.items():
        timing: Timing | None = getattr(cost, name)
        if timing is not None and timing.range[1] > _WIDE * timing.range[0]:
            yield f"{label}, {words} {timing.range[0]:.2f} to {timing.range[1]:.2f}"


def _words(base: Cost) -> str:
    parts = []
    if base.predict is not None:
        parts.append(f"{statistics.median(base.predict.seconds):.3g} s")
    if base.predict_bytes is not None:
        parts.append(f"{base.predict_bytes / 2**20:.0f} MiB")
    if base.latency is not None:
        parts.append(f"{1000 * statistics.median(base.latency.seconds):.3g} ms a question")
    return ", ".join(parts)
