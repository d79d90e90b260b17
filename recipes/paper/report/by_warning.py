"""The claims on fits with a warning beside those without."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bmoe_lightning.metrics import get_metric
from bmoe_lightning.report import MethodResult
from bmoe_lightning.report.alike import without_particulars
from recipes.common.report_parts import Section, markdown_table
from recipes.paper.report.bars import number, pair_words
from recipes.paper.report.compared import Bar
from recipes.paper.report.section import ReportInput, metric_value

FEWEST_FITS = 5
"""Number of fits of either kind below which a claim is left out."""
_TITLE = "Where the methods warn"
_HEAD = ["difference", "data", "without a warning", "with a warning", "change within data sets"]
_HOW = (
    "The difference of the means over fits (one method, data set and seed each), whose number is in brackets. A fit "
    "has a warning if the method warns of something that the other one does not. The last column is the change from "
    "fits without to fits with a warning of the same data set, a mean over the data sets that have both, since the "
    "columns before it compare data sets too. No intervals, and no claims with fewer than "
    f"{FEWEST_FITS} fits of either kind."
)


def section(report: ReportInput) -> Section | None:
    """The claims about one method and another with enough fits of either kind; None if there are none.

    Args:
        report: What the report is made from.
    """
    rows, details = [], []
    for bar in report.bars:
        for other in bar.others:
            fits = _fits(report, bar, other)
            warned, plain = ([fit for fit in fits if _warns(*fit[1:]) == kind] for kind in (True, False))
            if min(len(warned), len(plain)) < FEWEST_FITS:
                continue
            values = _value(report, bar, plain), _value(report, bar, warned)
            change, names = _change(report, bar, plain, warned)
            details.append(
                {
                    "method": bar.method,
                    "other": other,
                    "data": bar.data,
                    "metric": bar.metric,
                    "relative": bar.relative,
                    "without": {"fits": _places(plain), "value": values[0]},
                    "with": {"fits": _places(warned), "value": values[1]},
                    "change": {"data": names, "value": change},
                }
            )
            counted = [f"{number(bar, value)} ({len(of)})" for value, of in zip(values, (plain, warned), strict=True)]
            within = "" if change is None else f"{number(bar, change)} ({len(names)} data sets)"
            words = pair_words(bar, (fits[0][1].label, fits[0][2].label))
            rows.append([words, bar.data_words, *counted, within])
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
    """Whether the method has a warning that the other one does not have, whatever its numbers."""
    known = {without_particulars(sentence) for sentence in other.warnings}
    return any(without_particulars(sentence) not in known for sentence in ours.warnings)


def _change(
    report: ReportInput, bar: Bar, plain: Sequence[_Fit], warned: Sequence[_Fit]
) -> tuple[float | None, list[str]]:
    """The change from plain to warned fits, a mean over the data sets that have both, and their names."""
    of_kinds = [
        {name: [fit for fit in fits if fit[0] == name] for name in report.study.labels} for fits in (plain, warned)
    ]
    names = [name for name in report.study.labels if all(of_kind[name] for of_kind in of_kinds)]
    changes = [_value(report, bar, of_kinds[1][name]) - _value(report, bar, of_kinds[0][name]) for name in names]
    return (statistics.fmean(changes) if changes else None), names


def _value(report: ReportInput, bar: Bar, fits: Sequence[_Fit]) -> float:
    metric = get_metric(bar.metric)
    ours, others = (
        statistics.fmean(metric_value(result, metric, report.settings) for result in results)
        for results in ([fit[1] for fit in fits], [fit[2] for fit in fits])
    )
    return ours / others - 1 if bar.relative else ours - others


def _places(fits: Sequence[_Fit]) -> list[dict[str, Any]]:
    return [{"tested_on": tested, "seed": ours.seed} for tested, ours, _ in fits]
