"""Which differences are real: the claims of `compared.yaml`, each with the interval of a paired bootstrap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bmoe_lightning.metrics import get_metric
from bmoe_lightning.metrics.chance import chance_warning
from bmoe_lightning.report import Difference, Paired, paired_difference
from recipes.common.report_parts import Section, markdown_table
from recipes.paper.report.compared import Bar, DataChoice
from recipes.paper.report.section import ReportInput

_TITLE = "Is the difference real?"
_MARK = "†"
MET, MISSED, UNDECIDED = "met", "missed", "not decided"


@dataclass(frozen=True)
class Comparison:
    """A claim about two methods, and what was found.

    Attributes:
        bar: The claim.
        labels: Display names of the two methods.
        overall: Difference of the means over data sets.
        by_set: Difference on each data set.
        data: Names of the data sets that both methods were tested on.
        lacking: Names of those that one was not.
    """

    bar: Bar
    labels: tuple[str, str]
    overall: Difference
    by_set: Mapping[str, Difference]
    data: tuple[str, ...]
    lacking: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """What the interval of the mean over data sets says about the claim."""
        return verdict(self.bar, self.overall, self.labels)


@dataclass(frozen=True)
class Joint:
    """What was found of a claim about several other methods.

    Attributes:
        title: The claim in words.
        compared: Number of others that were compared.
        total: Number of others of the claim.
        verdict: Met if it is met for all others of the claim, missed if it is missed for one, otherwise not decided.
    """

    title: str
    compared: int
    total: int
    verdict: str


@dataclass(frozen=True)
class Guessed:
    """A data set that the reference answers no better than chance.

    Attributes:
        data: Whether the models were trained on it, or on the first one.
        tested_on: Name of the data set.
        seeds: Seeds of the models whose accuracy on the test items is not significantly above chance.
        total: Number of seeds.
    """

    data: DataChoice
    tested_on: str
    seeds: tuple[int, ...]
    total: int


def section(report: ReportInput) -> Section | None:
    """All claims whose methods the study has, and what is lacking for the others.

    Args:
        report: What the report is made from.
    """
    found, lacking = [], []
    for bar in report.bars:
        for other in bar.others:
            comparison = compare(report, bar, other)
            if comparison is None:
                lacking.append(f"{bar.title}: no results of both {bar.method} and {other} ({bar.data_words})")
            else:
                found.append(comparison)
    joint, by_chance = joint_verdicts(found), guessed(report, found)
    text = []
    if found:
        text = [_table(found), *_joint_table(joint), *_sets_table(report, found, by_chance)]
        text += [*_guessed_words(report, by_chance), _how(found)]
    if lacking:
        text.append("Not compared. " + "; ".join(lacking) + ".")
    details = {
        "bars": [_details(comparison) for comparison in found],
        "joint": [asdict(each) for each in joint],
        "guessed": [asdict(each) for each in by_chance],
    }
    return Section(_TITLE, text=tuple(text), details=details)


def compare(report: ReportInput, bar: Bar, other: str) -> Comparison | None:
    """One comparison; None if no data set has results of both methods with a common seed.

    Args:
        report: What the report is made from.
        bar: The claim.
        other: Row of the method that its method is compared with.
    """
    runs = report.runs_of(bar.data)
    pairs: dict[str, Paired] = {}
    for trained, name in runs:
        groups = report.all_groups(trained, name)
        if bar.method in groups and other in groups:
            pairs[name] = Paired(groups[bar.method], groups[other])
    seeds = [{result.seed for result in group} for pair in pairs.values() for group in (pair.ours, pair.others)]
    if not pairs or not set.intersection(*seeds):
        return None

    def difference(chosen: Sequence[Paired]) -> Difference:
        return paired_difference(chosen, get_metric(bar.metric), report.settings, relative=bar.relative)

    first = next(iter(pairs.values()))
    return Comparison(
        bar=bar,
        labels=(first.ours[0].label, first.others[0].label),
        overall=difference(list(pairs.values())),
        by_set={name: difference([pair]) for name, pair in pairs.items()},
        data=tuple(pairs),
        lacking=tuple(name for _, name in runs if name not in pairs),
    )


def verdict(bar: Bar, found: Difference, labels: tuple[str, str]) -> str:
    """Met or missed if the whole interval is on one side of the margin, otherwise not decided.

    Args:
        bar: The claim; where it claims nothing, the method with the better value is named.
        found: Difference with its interval.
        labels: Display names of the method and the other.
    """
    below, above = found.high < bar.margin, found.low > bar.margin
    if not (below or above):
        return UNDECIDED
    if bar.claim == "none":
        return f"{labels[0] if below != get_metric(bar.metric).higher_is_better else labels[1]} is better"
    return MET if below == (bar.claim == "lower") else MISSED


def joint_verdicts(found: Sequence[Comparison]) -> list[Joint]:
    """The verdicts on claims about several other methods, each on all of them together.

    That all parts are met at a level is met at that level (intersection-union test, Berger 1982,
    https://doi.org/10.1080/00401706.1982.10487790), so this direction needs no correction for their number.

    Args:
        found: All comparisons.
    """
    joint = []
    for bar in dict.fromkeys(comparison.bar for comparison in found):
        if len(bar.others) < 2 or bar.claim == "none":
            continue
        verdicts = [comparison.verdict for comparison in found if comparison.bar == bar]
        all_met = verdicts == [MET] * len(bar.others)
        together = MISSED if MISSED in verdicts else MET if all_met else UNDECIDED
        joint.append(Joint(bar.title, len(verdicts), len(bar.others), together))
    return joint


def guessed(report: ReportInput, found: Sequence[Comparison]) -> list[Guessed]:
    """The data sets of comparisons that the reference answers no better than chance, with one seed at least.

    Args:
        report: What the report is made from.
        found: The comparisons.
    """
    guesses = []
    for data in dict.fromkeys(comparison.bar.data for comparison in found):
        compared = {name for comparison in found if comparison.bar.data == data for name in comparison.data}
        for trained, tested in report.runs_of(data):
            group = report.all_groups(trained, tested).get(report.compared.reference, ()) if tested in compared else ()
            seeds = tuple(result.seed for result in group if chance_warning(result.log_probs, result.target))
            if seeds:
                guesses.append(Guessed(data, tested, seeds, len(group)))
    return guesses


def _guessed_words(report: ReportInput, by_chance: Sequence[Guessed]) -> list[str]:
    if not by_chance:
        return []
    places = "; ".join(
        f"{report.label(each.tested_on)}, {each.data.replace('_', ' ')} ({len(each.seeds)} of {each.total} seeds)"
        for each in by_chance
    )
    label = next(
        groups[report.compared.reference][0].label
        for groups in (report.all_groups(trained, tested) for trained, tested in report.runs_of(by_chance[0].data))
        if report.compared.reference in groups
    )
    return [
        f"{_MARK} {label} is not better than chance (one-sided binomial test of its accuracy on the test items at 5 %, "
        f"each seed alone): {places}. There the best prediction is a uniform one, so that a difference says which "
        "method is less sure, and not which one knows more. These data sets are part of the means and verdicts above."
    ]


def _table(found: Sequence[Comparison]) -> str:
    rows = [
        [
            comparison.bar.title,
            pair_words(comparison.bar, comparison.labels),
            _data(comparison),
            number(comparison.bar, comparison.overall.estimate),
            _interval(comparison.bar, comparison.overall),
            comparison.verdict,
        ]
        for comparison in found
    ]
    head = ["claim", "difference", "mean over", "value", f"{100 * found[0].overall.level:g} % interval", "verdict"]
    return markdown_table(head, rows)


def _joint_table(joint: Sequence[Joint]) -> list[str]:
    rows = [[each.title, f"{each.compared} of {each.total}", each.verdict] for each in joint]
    head = ["claim about several methods", "compared", "verdict"]
    return ["Met for all of them, or missed for one:\n\n" + markdown_table(head, rows)] if rows else []


def _sets_table(report: ReportInput, found: Sequence[Comparison], by_chance: Sequence[Guessed]) -> list[str]:
    """The differences by data set; none of one data set, which is the mean, unless a mark is told with it."""
    marked = {(each.data, each.tested_on) for each in by_chance}
    names = [name for name in report.study.labels if any(name in comparison.by_set for comparison in found)]
    if len(names) == 1 and not marked:
        return []
    rows = []
    for comparison in found:
        cells = [
            f"{number(comparison.bar, comparison.by_set[name].estimate)} "
            f"{_interval(comparison.bar, comparison.by_set[name])}"
            f"{f' {_MARK}' if (comparison.bar.data, name) in marked else ''}"
            if name in comparison.by_set
            else ""
            for name in names
        ]
        rows.append([pair_words(comparison.bar, comparison.labels), comparison.bar.data_words, *cells])
    return ["By data set:\n\n" + markdown_table(["difference", "data", *map(report.label, names)], rows)]


def _how(found: Sequence[Comparison]) -> str:
    counts = sorted({len(comparison.overall.seeds) for comparison in found})
    sentences = [
        "Paired bootstrap over test items and seeds; a seed is a pre-training, where the model is pre-trained, and a "
        "fine-tuning. Items that several data sets share are drawn together. A claim is met or missed where the whole "
        "interval is on one side of its margin. The intervals are not corrected for their number: among many "
        "differences of zero some are called real by chance.",
    ]
    if counts[0] == 1:
        sentences.append("With one seed the interval does not have the spread over trainings.")
    return " ".join(sentences)


def _details(comparison: Comparison) -> dict[str, Any]:
    return {
        **asdict(comparison.bar),
        "labels": comparison.labels,
        "verdict": comparison.verdict,
        "overall": asdict(comparison.overall),
        "by_set": {name: asdict(found) for name, found in comparison.by_set.items()},
        "lacking": comparison.lacking,
    }


def pair_words(bar: Bar, labels: tuple[str, str]) -> str:
    """The difference of a claim in words.

    Args:
        bar: The claim.
        labels: Display names of the two methods.
    """
    return f"{get_metric(bar.metric).title}, {labels[0]} {'over' if bar.relative else 'less'} {labels[1]}"


def _data(comparison: Comparison) -> str:
    count = len(comparison.data)
    total = count + len(comparison.lacking)
    return f"{count} of {total} data sets, {comparison.bar.data_words}"


def number(bar: Bar, value: float) -> str:
    """A difference as the tables print it: in percent where it is relative."""
    if not math.isfinite(value):
        return "not finite"
    return f"{100 * value:+.2f} %" if bar.relative else f"{value:+.4f}"


def _interval(bar: Bar, found: Difference) -> str:
    if not (math.isfinite(found.low) or math.isfinite(found.high)):
        return "no interval"
    return f"[{number(bar, found.low)}, {number(bar, found.high)}]"
