"""In- against out-of-distribution questions by every score of uncertainty, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bmoe_lightning.metrics import Estimate, detect_out_of_distribution
from bmoe_lightning.report import MethodResult, score_figure
from recipes.common.report_parts import NamedFigure, Section, markdown_table
from recipes.paper.report import detection
from recipes.paper.report.detection import score_of
from recipes.routers.report.section import RouterReport

_TITLE = "Distribution shift"
_OF_PROBABILITIES = ("entropy", "relative_entropy")
_VALUES = {"auroc": "AUROC", "aupr": "AUPR", "fpr95": "FPR95"}


def section(report: RouterReport) -> Section | None:
    """AUROC, AUPR and FPR95 of every score that a method has, and the scores in and out of distribution.

    Args:
        report: What the report is made from.
    """
    given = report.given
    home = given.study.home
    shifted = {name: groups for name in given.shifted if (groups := given.groups(home, name))}
    if not shifted:
        return None
    lines, details = [], {}
    for row, group in report.on_all_layers():
        for score in [*_OF_PROBABILITIES, *sorted(group[0].uncertainty)]:
            found = {
                name: estimates
                for name, groups in shifted.items()
                if (estimates := _detected(report, group, groups.get(row, ()), score)) is not None
            }
            if not found:
                continue
            details[f"{row}/{score}"] = {
                name: {key: [e.value, e.low, e.high] for key, e in of_set.items()} for name, of_set in found.items()
            }
            cells = [_words(found[name]["auroc"]) if name in found else "" for name in shifted]
            lines.append([group[0].label, score.replace("_", " "), *cells])
    head = ["method", "score", *map(given.label, shifted)]
    number = len(report.groups[report.known.reference][0].ids)
    text = [
        f"AUROC of test questions of other data sets (positive) against the {number} of {given.label(home)}, mean over "
        "seeds, with the 95 % interval of a bootstrap over questions. Every score is higher where a prediction is more "
        "uncertain; the direction is fixed and never taken from the data, so a score that points the wrong way is "
        "below .5. AUPR and FPR95 with their intervals are in `results.json`.",
        markdown_table(head, lines),
    ]
    published = report.published.get("detection", ())
    if published:
        rows = [[f"{entry['label']} (published)", f"{entry['auroc']:.3f}"] for entry in published]
        text.append("Means over the papers' shifts:\n\n" + markdown_table(["score", "AUROC"], rows))
    rest = detection.section(given)
    notes = () if rest is None else rest.text[1:]
    figures = tuple(_figures(report, shifted))
    return Section(_TITLE, figures=figures, text=(*text, *notes), details={"out_of_distribution": details})


def tables(report: RouterReport) -> Section | None:
    """All scores of all rows, in files of their own, and wrong answers against right ones.

    Args:
        report: What the report is made from.
    """
    found = detection.section(report.given)
    if found is None:
        return None
    return Section(f"{_TITLE}, all scores", linked_grids=(*found.grids, *found.linked_grids))


def _detected(
    report: RouterReport, inside: Sequence[MethodResult], outside: Sequence[MethodResult], score: str
) -> dict[str, Estimate] | None:
    """The three values of a score, means over the seeds that have it; None without any."""
    pairs = list(_pairs(inside, outside, score).values())
    if not pairs:
        return None
    settings = report.given.settings
    return detect_out_of_distribution(
        torch.stack([one for one, _ in pairs]),
        torch.stack([other for _, other in pairs]),
        num_samples=settings.num_samples,
        seed=settings.bootstrap_seed,
        level=settings.level,
    )


def _pairs(
    inside: Sequence[MethodResult], outside: Sequence[MethodResult], score: str
) -> dict[int, tuple[Tensor, Tensor]]:
    """Scores in and out of distribution by seed."""
    others = {result.seed: score_of(result, score) for result in outside}
    found = {result.seed: (score_of(result, score), others.get(result.seed)) for result in inside}
    return {seed: (one, other) for seed, (one, other) in found.items() if one is not None and other is not None}


def _words(found: Estimate) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _figures(report: RouterReport, shifted: Mapping[str, Mapping[str, Sequence[MethodResult]]]) -> list[NamedFigure]:
    """The scores of untrained noise, and of the fine-tuned model, each data set a colour."""
    figures = []
    for row in (report.known.reference, report.known.noise):
        group = report.groups.get(row, ())
        names = [*_OF_PROBABILITIES, *sorted(group[0].uncertainty)] if group else []
        scores: dict[str, dict[str, Tensor]] = {}
        for name in names:
            sets = {report.given.label(report.given.study.home): group}
            sets |= {report.given.label(other): groups.get(row, ()) for other, groups in shifted.items()}
            found = {
                label: torch.cat(values)
                for label, results in sets.items()
                if (values := [value for result in results if (value := score_of(result, name)) is not None])
            }
            if found:
                scores[name.replace("_", " ")] = found
        if scores:
            caption = f"Scores of {report.label(row)} in distribution (first) and under shift, all seeds."
            figures.append(NamedFigure(f"scores_{row}", caption, lambda scores=scores: score_figure(scores)))  # type: ignore[misc]
    return figures
