"""Do scores of uncertainty tell out-of-distribution questions and wrong answers apart?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bmoe_lightning.laplace.predictive import entropy
from bmoe_lightning.laplace.uncertainty_scores import one_minus_max_probability
from bmoe_lightning.metrics.detection import detection_values
from bmoe_lightning.report import Cell, Grid, GridBlock, GridRow, MethodResult, NumberFormat
from recipes.common.report_parts import Section
from recipes.paper.report.section import Groups, ReportInput

_TITLE = "Out of distribution"
_OF_LOG_PROBS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "max_probability": one_minus_max_probability,
    "entropy": entropy,
    "relative_entropy": lambda log_probs: (
        entropy(log_probs) / (log_probs > -torch.inf).sum(1).clamp(min=2).double().log()
    ),
}
_WORDS = {
    "max_probability": "1 - maximum probability",
    "relative_entropy": "entropy over that of a uniform guess",
    "logit_variance": "the mean variance of the centred logits",
    "relative_variance": "the variance of the logits over that under the prior",
}
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
    tested = {home: inside, **outside}
    names = _names(tested)
    by_score = {name: grid for name in names if (grid := _distribution_grid(report, name, inside, outside)) is not None}
    errors = {name: grid for name in names if (grid := _error_grid(report, name, tested)) is not None}
    text = [
        "Higher scores are more uncertain, and the positive class, of which AUPR and the 95 % of FPR95 are, is what "
        "should be: an out-of-distribution question, or a wrong answer. A score that knows nothing has an AUROC of .5 "
        "and an AUPR of the share of positives."
    ]
    summaries = [
        _summary(found, f"{report.model}, trained on {report.label(home)}: AUROC of {what}.")
        for found, what in (
            (by_score, f"test questions of other data sets (positive) against those of {report.label(home)}"),
            (errors, "wrong answers (positive) against right ones"),
        )
        if found
    ]
    if fewer := _fewer_seeds({**by_score, **{f"{name} (errors)": grid for name, grid in errors.items()}}, tested):
        text.append(
            "Not all seeds have all scores, which predictions of an older version may lack: " + "; ".join(fewer) + "."
        )
    other = [name for name, groups in outside.items() if _num_choices(groups) != _num_choices(inside)]
    if other:
        listed = ", ".join(map(report.label, other))
        text.append(
            f"Questions of {listed} have another number of choices than those of {report.label(home)}, which moves "
            "probability, entropy and mutual information by itself: fewer choices look more certain. The entropy over "
            "that of a uniform guess does not depend on it in this way."
        )
    return Section(
        _TITLE, grids=tuple(summaries), linked_grids=(*by_score.values(), *errors.values()), text=tuple(text)
    )


def _summary(by_score: Mapping[str, Grid], caption: str) -> Grid:
    """The AUROC of all scores in one table."""
    first = next(iter(by_score.values()))
    blocks = (replace(grid.blocks[0], title=_words(score)) for score, grid in by_score.items())
    kind = first.name.removesuffix(f"_{next(iter(by_score))}")
    return Grid(kind, caption, "method", first.columns, tuple(blocks))


def _fewer_seeds(grids: Mapping[str, Grid], tested: Mapping[str, Groups]) -> list[str]:
    """The rows of which a table has fewer seeds than were tested, with the numbers."""
    tested_seeds: dict[str, set[int]] = {}
    for groups in tested.values():
        for row, group in groups.items():
            tested_seeds.setdefault(row, set()).update(result.seed for result in group)
    found = []
    for name, grid in grids.items():
        for line in grid.blocks[0].rows:
            fewest = min(len(cell.seeds) for cell in line.cells if cell is not None)
            if fewest < (number := len(tested_seeds[line.key])):
                found.append(f"{_words(name)} of {line.label}, {fewest} of {number} seeds")
    return found


def score_of(result: MethodResult, name: str) -> Tensor | None:
    """A score `[N]`, higher where a prediction is more uncertain; None if the result does not have it.

    Args:
        result: Predictions.
        name: Name of a score of log-probabilities, or of `MethodResult.uncertainty`.
    """
    if name in _OF_LOG_PROBS:
        return _OF_LOG_PROBS[name](result.log_probs)
    return result.uncertainty.get(name)


def _names(tested: Mapping[str, Groups]) -> list[str]:
    """All scores that some result has."""
    results = (result for groups in tested.values() for group in groups.values() for result in group)
    return list(dict.fromkeys([*_OF_LOG_PROBS, *(name for result in results for name in result.uncertainty)]))


_Found = dict[tuple[str, str], dict[int, dict[str, float]]]


def _distribution_grid(report: ReportInput, score: str, inside: Groups, outside: Mapping[str, Groups]) -> Grid | None:
    if not outside:
        return None
    found: _Found = {}
    for row, group in inside.items():
        for name, groups in outside.items():
            others = {result.seed: score_of(result, score) for result in groups.get(row, ())}
            pairs = {result.seed: (score_of(result, score), others.get(result.seed)) for result in group}
            found[row, name] = {
                seed: _told_apart(one, other)
                for seed, (one, other) in pairs.items()
                if one is not None and other is not None
            }
    sizes = {name: len(next(iter(groups.values()))[0].ids) for name, groups in {"": inside, **outside}.items()}
    listed = ", ".join(f"{report.label(name)} {sizes[name]}" for name in outside)
    caption = (
        f"{report.model}: test questions of other data sets (positive; {listed}) against the {sizes['']} of "
        f"{report.label(report.study.home)}, by {_words(score)}."
    )
    return _grid(report, f"out_of_distribution_{score}", caption, inside, tuple(outside), found)


def _error_grid(report: ReportInput, score: str, tested: Mapping[str, Groups]) -> Grid | None:
    rows = {row: group for groups in tested.values() for row, group in groups.items()}
    found: _Found = {
        (row, name): {
            result.seed: detection_values(scores, result.log_probs.argmax(1) != result.target)
            for result in groups.get(row, ())
            if (scores := score_of(result, score)) is not None
        }
        for name, groups in tested.items()
        for row in rows
    }
    caption = (
        f"{report.model}, trained on {report.label(report.study.home)}: wrong answers (positive) against right "
        f"ones, by {_words(score)}."
    )
    return _grid(report, f"errors_{score}", caption, rows, tuple(tested), found)


def _told_apart(inside: Tensor, outside: Tensor) -> dict[str, float]:
    positive = torch.arange(len(inside) + len(outside)) >= len(inside)
    return detection_values(torch.cat([inside, outside]), positive)


def _words(score: str) -> str:
    return _WORDS.get(score, score.replace("_", " "))


def _grid(
    report: ReportInput, name: str, caption: str, rows: Groups, columns: Sequence[str], found: _Found
) -> Grid | None:
    shown = {row: group for row, group in rows.items() if any(found[row, column] for column in columns)}
    if not shown:
        return None
    blocks = [
        GridBlock(
            title,
            (format,) * len(columns),
            tuple(
                GridRow(row, group[0].label, tuple(_cell(found[row, column], value) for column in columns))
                for row, group in shown.items()
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
