"""What the parts of a report are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from bmoe_lightning.methods import get_method
from bmoe_lightning.metrics import MetricSpec, check_predictions, get_metric
from bmoe_lightning.report import Cell, Grid, GridBlock, GridRow, MethodResult, NumberFormat, SummarySettings
from recipes.paper.outcomes import MODES, Mode, Study
from recipes.paper.report.compared import Bar, Compared, DataChoice
from recipes.paper.report.published import Published

if TYPE_CHECKING:
    from recipes.paper.report.attribution import Attributed
    from recipes.paper.report.costs import Costs

Groups = Mapping[str, Sequence[MethodResult]]
"""Results of each row, by ascending seed, in the order of rows."""

LAYOUT = ("acc", "ece", "nll")
"""The metrics of the paper's tables."""
_PERCENT = ("acc", "ece")


@dataclass(frozen=True)
class ReportInput:
    """What a report is made from.

    Attributes:
        study: Outcomes.
        compared: Methods that are known by name, and claims.
        published: Numbers of a publication.
        costs: Costs of the rows; None if none were measured.
        attribution: Where the variance of one method's predictions comes from; None if it was not made.
        settings: ECE convention and bootstrap.
    """

    study: Study
    compared: Compared
    published: Published
    costs: Costs | None = None
    attribution: Attributed | None = None
    settings: SummarySettings = field(default_factory=SummarySettings)

    @property
    def model(self) -> str:
        """The study's model at the beginning of a sentence; a hub id or a folder stays as it was given."""
        words = self.study.model
        return f"The {words.removeprefix('the ')}" if words.startswith("the ") else words

    @property
    def shifted(self) -> tuple[str, ...]:
        """The data sets other than that of the training under shift."""
        return tuple(name for name in self.study.labels if name != self.study.home)

    def runs_of(self, data: DataChoice) -> list[tuple[str, str]]:
        """Data sets of training and test, in distribution or under shift.

        Args:
            data: Which of the two.
        """
        if data == "in_distribution":
            return [(name, name) for name in self.study.labels]
        return [(self.study.home, name) for name in self.shifted]

    @property
    def bars(self) -> tuple[Bar, ...]:
        """The claims, those about parts of the layers for as many parts as the study has left out."""
        numbers = [self.compared.without_part(row) for groups in self._groups.values() for row in groups]
        return self.compared.bars_of_parts(max((number for number in numbers if number is not None), default=0))

    @cached_property
    def _groups(self) -> dict[tuple[str, str], Groups]:
        found: dict[tuple[str, str], dict[str, list[MethodResult]]] = {}
        # Rows of the experts first, so that those of LoRA follow where no order is given.
        for outcome in sorted(self.study.outcomes, key=lambda outcome: MODES.index(outcome.mode)):
            rows = found.setdefault((outcome.trained_on, outcome.tested_on), {})
            for result in outcome.results:
                named = _row(result, outcome.mode)
                rows.setdefault(named.method, []).append(named)
        return {key: self._ordered(rows) for key, rows in found.items()}

    def _ordered(self, rows: Mapping[str, list[MethodResult]]) -> Groups:
        names = [*(name for name in self.compared.order if name in rows), *rows]
        return {name: sorted(rows[name], key=lambda result: result.seed) for name in dict.fromkeys(names)}

    def all_groups(self, trained_on: str, tested_on: str) -> Groups:
        """Results of all rows, those without a part of the layers too; empty if there are none.

        Args:
            trained_on: Data set of the training.
            tested_on: Data set of the test questions.
        """
        return self._groups.get((trained_on, tested_on), {})

    def groups(self, trained_on: str, tested_on: str) -> Groups:
        """Results of the rows of a table; empty if there are none.

        Args:
            trained_on: Data set of the training.
            tested_on: Data set of the test questions.
        """
        found = self.all_groups(trained_on, tested_on)
        return {name: group for name, group in found.items() if self.compared.without_part(name) is None}

    def label(self, name: str) -> str:
        """Display name of a data set."""
        return self.study.labels.get(name, name)

    def missing(self, runs: Sequence[tuple[str, str]]) -> str | None:
        """A sentence on the runs that there are no results of; None if there are none missing.

        Args:
            runs: Data sets of training and test.
        """
        found = {(entry.trained_on, entry.tested_on) for entry in self.study.outcomes if entry.mode == "experts"}
        lacking = [
            f"trained on {self.label(trained)} and tested on {self.label(tested)}"
            for trained, tested in runs
            if (trained, tested) not in found
        ]
        if not lacking:
            return None
        return f"Left out, since the study has no models {'; '.join(lacking)}."


def row_of(method: str, mode: Mode) -> str:
    """Row of a method: in a LoRA run a name of its own, unless the method is of such runs only.

    Args:
        method: Name of the method.
        mode: What was fine-tuned.
    """
    if mode != "lora":
        return method
    try:
        is_of_lora = get_method(method).needs.lora
    except ValueError:  # an instance under another name
        is_of_lora = False
    return method if is_of_lora else f"{method}_lora"


def _row(result: MethodResult, mode: Mode) -> MethodResult:
    """A result under the name of its row."""
    row = row_of(result.method, mode)
    return result if row == result.method else replace(result, method=row, label=f"{result.label} (LoRA)")


def metric_value(result: MethodResult, metric: MetricSpec, settings: SummarySettings) -> float:
    """A metric of one method and seed.

    Args:
        result: The result.
        metric: Metric.
        settings: ECE convention.
    """
    return float(metric.value(*check_predictions(result.log_probs, result.target), settings.binning))


def cell_of(group: Sequence[MethodResult], metric: MetricSpec, settings: SummarySettings) -> Cell:
    """A metric of one row.

    Args:
        group: Results over seeds.
        metric: Metric.
        settings: ECE convention.
    """
    values = [metric_value(result, metric, settings) for result in group]
    return Cell.of(values, [result.seed for result in group])


def layout_format(metric: MetricSpec) -> NumberFormat:
    """The format of a metric in the paper's tables: percent with a digit, or three digits."""
    if metric.name in _PERCENT:
        return NumberFormat(metric.higher_is_better, digits=1, scale=100)
    return NumberFormat(metric.higher_is_better)


def layout_title(metric: MetricSpec) -> str:
    """The title of a metric in the paper's tables, with unit and direction."""
    return metric.header.replace(metric.title, f"{metric.title} (%)", 1) if metric.name in _PERCENT else metric.header


def metric_grid(
    report: ReportInput,
    name: str,
    caption: str,
    runs: Sequence[tuple[str, str]],
    labels: Mapping[str, str] | None = None,
) -> Grid | None:
    """A table in the paper's layout: a block a metric, a row a method, a column a data set.

    Args:
        report: What the report is made from.
        name: Identifier of the table.
        caption: Caption; numbers of items and seeds are added.
        runs: Data sets of training and test of each column.
        labels: Rows to show and their labels; None for all.

    Returns:
        The table; None if there is no row.
    """
    columns = [report.groups(*run) for run in runs]
    if labels is None:
        shown = {name: group[0].label for groups in columns for name, group in groups.items()}
    else:
        shown = {name: label for name, label in labels.items() if any(name in groups for groups in columns)}
    if not shown:
        return None
    tested = [tested for _, tested in runs]
    blocks = []
    for metric in map(get_metric, LAYOUT):
        rows = [
            GridRow(
                row,
                label,
                tuple(cell_of(groups[row], metric, report.settings) if row in groups else None for groups in columns),
            )
            for row, label in shown.items()
        ]
        rows += report.published.rows(report.study.preset, name, metric.name, tested)
        blocks.append(GridBlock(layout_title(metric), (layout_format(metric),) * len(runs), tuple(rows)))
    titles = tuple(report.label(name) for name in tested)
    return Grid(name, f"{caption} {counts(titles, columns)}", "method", titles, tuple(blocks))


def counts(titles: Sequence[str], columns: Sequence[Groups]) -> str:
    """Sentences on the numbers of test items and seeds.

    Args:
        titles: Display names of the data sets.
        columns: Results on each of them.
    """
    groups = [group for rows in columns for group in rows.values()]
    seeds = {tuple(result.seed for result in group) for group in groups}
    sizes = [len(next(iter(rows.values()))[0].ids) for rows in columns if rows]
    listed = ", ".join(f"{title} {size}" for title, size in zip(titles, sizes, strict=True))
    if len(seeds) > 1:
        return f"Test items: {listed}. The seeds are not the same for every number; results.json has them."
    number = len(next(iter(seeds)))
    return f"Test items: {listed}. {number} seed{'s: mean ± standard deviation' if number > 1 else ''}."
