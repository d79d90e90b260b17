"""The claims on fits with a warning and on those without: does a method say when it fails?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bmoe_lightning.metrics import get_metric
from bmoe_lightning.report import MethodResult
from recipes.paper.report.bars import markdown_table, number, pair_words
from recipes.paper.report.compared import Bar
from recipes.paper.report.section import ReportInput, Section, metric_value

_TITLE = "Do the methods say when they fail?"
_HEAD = ["difference", "data", "fits without a warning", "value", "fits with a warning", "value"]
_HOW = (
    "The difference of the means over fits: a fit is one method, data set and seed, and has a warning of its own where "
    "the method warns and the other one does not. No intervals: there are few fits of either kind."
)


def section(report: ReportInput) -> Section | None:
    """The claims about one method and another whose fits warn in part; None if there are none.

    Args:
        report: What the report is made from.
    """
    rows, details = [], []
    for bar in report.bars:
        for other in bar.others:
            fits = _fits(report, bar, other)
            warned, plain = ([fit for fit in fits if _warns(*fit[1:]) == kind] for kind in (True, False))
            if not warned or not plain:
                continue
            measured = {kind: _value(report, bar, chosen) for kind, chosen in (("without", plain), ("with", warned))}
            found = {
                "method": bar.method,
                "other": other,
                "data": bar.data,
                "metric": bar.metric,
                "relative": bar.relative,
                "without": {"fits": _places(plain), "value": measured["without"]},
                "with": {"fits": _places(warned), "value": measured["with"]},
            }
            details.append(found)
            values = [number(bar, value) for value in measured.values()]
            words = pair_words(bar, (fits[0][1].label, fits[0][2].label))
            rows.append([words, bar.data_words, str(len(plain)), values[0], str(len(warned)), values[1]])
    if not rows:
        return None
    return Section(_TITLE, text=(markdown_table(_HEAD, rows), _HOW), details={"by_warning": details})


_Fit = tuple[str, MethodResult, MethodResult]


def _fits(report: ReportInput, bar: Bar, other: str) -> list[_Fit]:
    """Data set of the test questions and the results of both methods, for each data set and seed that both have."""
    found = []
    for trained, tested in report.runs_of(bar.data):
        groups = report.all_groups(trained, tested)
        others = {result.seed: result for result in groups.get(other, ())}
        found += [(tested, ours, others[ours.seed]) for ours in groups.get(bar.method, ()) if ours.seed in others]
    return found


def _warns(ours: MethodResult, other: MethodResult) -> bool:
    """Whether the method has a warning that the other one does not have."""
    return not set(ours.warnings) <= set(other.warnings)


def _value(report: ReportInput, bar: Bar, fits: Sequence[_Fit]) -> float:
    metric = get_metric(bar.metric)
    ours, others = (
        statistics.fmean(metric_value(result, metric, report.settings) for result in results)
        for results in ([fit[1] for fit in fits], [fit[2] for fit in fits])
    )
    return ours / others - 1 if bar.relative else ours - others


def _places(fits: Sequence[_Fit]) -> list[dict[str, Any]]:
    return [{"tested_on": tested, "seed": ours.seed} for tested, ours, _ in fits]
