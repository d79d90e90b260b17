"""Which random routers beat untrained noise, and the controls without it."""

from __future__ import annotations

from dataclasses import replace

from recipes.common.report_parts import Section
from recipes.paper.report import bars
from recipes.paper.report.bars import MET
from recipes.routers.report.section import RouterReport

_TITLE = "Do random routers help?"


def section(report: RouterReport) -> Section | None:
    """All differences with their intervals, and a sentence on every router that does not beat untrained noise.

    Args:
        report: What the report is made from.
    """
    found = bars.section(report.given)
    if found is None:
        return None
    rows = dict.fromkeys(bar.method for bar in report.given.bars)
    worse = [sentence for row in rows if (sentence := _sentence(report, row))]
    told = ("\n".join(f"- {line}" for line in worse),) if worse else ()
    return replace(found, title=_TITLE, text=(*told, *found.text))


def _sentence(report: RouterReport, row: str) -> str | None:
    """What is said of a random router that is not better than untrained noise; None of others, and of the noise."""
    noise = report.known.noise
    for bar in report.given.bars:
        if bar.method != row or noise not in bar.others:
            continue
        comparison = bars.compare(report.given, bar, noise)
        if comparison is None or comparison.verdict == MET:
            return None
        overall = comparison.overall
        return (
            f"**{comparison.labels[0]} does not beat untrained noise** ({comparison.labels[1]}) in NLL: "
            f"{overall.estimate:+.3f} [{overall.low:+.3f}, {overall.high:+.3f}]"
        )
    return None
