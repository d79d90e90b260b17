"""Do scores of uncertainty tell out-of-distribution questions and wrong answers apart?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bmoe_lightning.laplace.predictive import entropy
from bmoe_lightning.laplace.uncertainty_scores import one_minus_max_probability
from bmoe_lightning.metrics.detection import detection_values
from bmoe_lightning.report import Cell, Grid, GridBlock, GridRow, MethodResult, NumberFormat
from recipes.paper.report.section import Groups, ReportInput, Section

_TITLE = "Out of distribution"
SCORES: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "max_probability": ("1 - maximum probability", one_minus_max_probability),
    "entropy": ("entropy", entropy),
}
"""Scores of log-probabilities, higher where a prediction is more uncertain, with their names in words."""
_VALUES = {
    "auroc": ("AUROC ↑", NumberFormat(higher_is_better=True)),
    "aupr": ("AUPR ↑", NumberFormat(higher_is_better=True)),
    "fpr95": ("FPR95 ↓", NumberFormat(higher_is_better=False)),
}


def section(report: ReportInput) -> Section | None:
    """In- against out-of-distribution questions, and right against wrong answers, by each score; None without results.

    Args:
        report: What the report is made from.
    """
    home = report.study.home
    inside = report.groups(home, home)
    outside = {name: groups for name in report.shifted if (groups := report.groups(home, name))}
    if not inside:
        return None
    grids = []
    for score in SCORES:
        if outside:
            grids.append(_distribution_grid(report, score, inside, outside))
        grids.append(_error_grid(report, score, {home: inside, **outside}))
    text = [
        "Higher scores are more uncertain, and the positive class, of which AUPR and the 95 % of FPR95 are, is what "
        "should be: an out-of-distribution question, or a wrong answer. A score that knows nothing has an AUROC of .5 "
        "and an AUPR of the share of positives."
    ]
    other = [name for name, groups in outside.items() if _num_choices(groups) != _num_choices(inside)]
    if other:
        listed = ", ".join(map(report.label, other))
        text.append(
            f"Questions of {listed} have another number of choices than those of {report.label(home)}, which moves "
            "both scores by itself: fewer choices look more certain."
        )
    return Section(_TITLE, grids=tuple(grids), text=tuple(text))


def _distribution_grid(report: ReportInput, score: str, inside: Groups, outside: Mapping[str, Groups]) -> Grid:
    words, of_score = SCORES[score]
    found: _Found = {}
    shown = {row: group for row, group in inside.items() if any(row in groups for groups in outside.values())}
    for row, group in shown.items():
        for name, groups in outside.items():
            others = {result.seed: of_score(result.log_probs) for result in groups.get(row, ())}
            found[row, name] = {
                result.seed: _told_apart(of_score(result.log_probs), others[result.seed])
                for result in group
                if result.seed in others
            }
    sizes = {name: len(next(iter(groups.values()))[0].ids) for name, groups in {"": inside, **outside}.items()}
    listed = ", ".join(f"{report.label(name)} {sizes[name]}" for name in outside)
    caption = (
        f"{report.study.model}: test questions of other data sets (positive; {listed}) against the {sizes['']} of "
        f"{report.label(report.study.home)}, by {words}."
    )
    return _grid(report, f"out_of_distribution_{score}", caption, shown, tuple(outside), found)


def _error_grid(report: ReportInput, score: str, tested: Mapping[str, Groups]) -> Grid:
    words, of_score = SCORES[score]
    labels = {row: group for groups in tested.values() for row, group in groups.items()}
    found: _Found = {
        (row, name): {result.seed: _wrong_told(of_score, result) for result in groups.get(row, ())}
        for name, groups in tested.items()
        for row in labels
    }
    caption = (
        f"{report.study.model}, trained on {report.label(report.study.home)}: wrong answers (positive) against right "
        f"ones, by {words}."
    )
    return _grid(report, f"errors_{score}", caption, labels, tuple(tested), found)


_Found = dict[tuple[str, str], dict[int, dict[str, float]]]


def _told_apart(inside: Tensor, outside: Tensor) -> dict[str, float]:
    positive = torch.arange(len(inside) + len(outside)) >= len(inside)
    return detection_values(torch.cat([inside, outside]), positive)


def _wrong_told(of_score: Callable[[Tensor], Tensor], result: MethodResult) -> dict[str, float]:
    return detection_values(of_score(result.log_probs), result.log_probs.argmax(1) != result.target)


def _grid(report: ReportInput, name: str, caption: str, rows: Groups, columns: Sequence[str], found: _Found) -> Grid:
    blocks = [
        GridBlock(
            title,
            (format,) * len(columns),
            tuple(
                GridRow(row, group[0].label, tuple(_cell(found[row, column], value) for column in columns))
                for row, group in rows.items()
            ),
        )
        for value, (title, format) in _VALUES.items()
    ]
    return Grid(name, caption, "method", tuple(map(report.label, columns)), tuple(blocks))


def _cell(by_seed: Mapping[int, Mapping[str, float]], value: str) -> Cell | None:
    return Cell.of([found[value] for found in by_seed.values()], list(by_seed)) if by_seed else None


def _num_choices(groups: Groups) -> set[int]:
    log_probs = next(iter(groups.values()))[0].log_probs
    return set((log_probs > -torch.inf).sum(1).tolist())
