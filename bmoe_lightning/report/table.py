"""Results tables: an aligned one for the terminal, and one in markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bmoe_lightning.metrics import HEADLINE_METRICS, METRIC_NAMES, MetricSpec
from bmoe_lightning.report.alike import alike, told_once
from bmoe_lightning.report.results import MetricSummary, Row

_GAP = "  "
_DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
_SUPERSCRIPT = str.maketrans("0123456789", _DIGITS)
_HEADER = ("method", *(metric.header for metric in HEADLINE_METRICS))


def caption(rows: Sequence[Row]) -> str:
    """The caption of a table: numbers of items and seeds, conventions, interval.

    Args:
        rows: From `summarise`.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows to show")
    settings = rows[0].settings
    parts = [
        f"{rows[0].num_examples} test items, {_seed_words(rows)}.",
        *filter(None, (metric.note(settings.binning) for metric in HEADLINE_METRICS)),
        f"In brackets: {settings.interval()}.",
    ]
    if any(len(row.seeds) > 1 for row in rows):
        parts.append("±: standard deviation over seeds.")
    return " ".join(parts)


def footnotes(rows: Sequence[Row]) -> dict[str, str]:
    """The warnings of all rows: the mark of each sentence, such as `¹`; those that differ in numbers alone share one.

    Args:
        rows: From `summarise`.
    """
    groups = alike(sentence for row in rows for sentence in row.warnings)
    return {sentence: str(n).translate(_SUPERSCRIPT) for n, group in enumerate(groups, 1) for sentence in group}


def results_table(rows: Sequence[Row], *, width: int = 120) -> str:
    """Table in aligned plain text, one row for each method, with its caption, and a footnote for each warning.

    If a line would exceed `width`, intervals are on a separate line below the means; a label that is still too long is
    truncated.

    Args:
        rows: From `summarise`.
        width: Width of the terminal in columns, at least 80.

    Raises:
        ValueError: If there are no rows or the terminal is too narrow.
    """
    if width < 80:
        raise ValueError(f"width must be at least 80 columns, found {width}")
    note = caption(rows)
    marks = footnotes(rows)
    labels = [_marked(row.label, row, marks) for row in rows]
    lines = [
        [label, *(f"{_mean(m)} {_interval(m)}" for m in _cells(row))] for label, row in zip(labels, rows, strict=True)
    ]
    if _total_width(_column_widths([_HEADER, *lines])) > width:
        lines = [
            line
            for label, row in zip(labels, rows, strict=True)
            for line in (
                [label, *(_mean(m) for m in _cells(row))],
                ["", *(_interval(m) for m in _cells(row))],
            )
        ]
    widths = _column_widths([_HEADER, *lines])
    widths[0] = max(len(_HEADER[0]), min(widths[0], width - _total_width(widths[1:]) - len(_GAP)))
    rule = "─" * _total_width(widths)
    body = [_aligned(line, widths) for line in lines]
    notes = [line for sentence in _notes(marks) for line in _wrapped(sentence, width)]
    return "\n".join([_aligned(_HEADER, widths), rule, *body, rule, *_wrapped(note, width), *notes])


def results_markdown(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Markdown table of the headline metrics, the best mean of each in bold, with its caption and footnotes.

    Further metrics are in a second table below it, and further numbers in a third; the footnotes are the warnings.

    Args:
        rows: From `summarise`.
        notes: Sentences below the footnotes.

    Raises:
        ValueError: If there are no rows.
    """
    note = caption(rows)
    marks = footnotes(rows)
    best = {metric.name: _best(rows, metric) for metric in HEADLINE_METRICS}
    lines = [list(_HEADER)]
    for row in rows:
        cells = []
        for name in METRIC_NAMES:
            metric = row.metrics[name]
            mean = f"**{_mean(metric)}**" if len(rows) > 1 and _number(metric.mean) == best[name] else _mean(metric)
            cells.append(f"{mean} {_interval(metric)}")
        lines.append([_escaped(_marked(row.label, row, marks)), *cells])
    further = _further_metrics(rows)
    blocks = [_markdown_table(lines), note + (" Bold: best mean." if len(rows) > 1 else "")]
    extra_names = list(dict.fromkeys(name for row in rows for name in row.extra))
    if extra_names:
        numbers = [["method", *map(_escaped, extra_names)]]
        for row in rows:
            numbers.append(
                [_escaped(row.label), *(f"{row.extra[n]:.4g}" if n in row.extra else "" for n in extra_names)]
            )
        blocks.insert(1, _markdown_table(numbers))
    if further:
        blocks.insert(1, _markdown_table(further))
    blocks += map(_escaped, _notes(marks))
    blocks += map(_escaped, notes)
    return "\n\n".join(blocks) + "\n"


def _further_metrics(rows: Sequence[Row]) -> list[list[str]]:
    """Lines of the table of metrics beside the headline ones; none if there are no such metrics."""
    metrics = rows[0].settings.metrics[len(HEADLINE_METRICS) :]
    if not metrics:
        return []
    lines = [["method", *(metric.header for metric in metrics)]]
    for row in rows:
        found = [row.metrics[metric.name] for metric in metrics]
        lines.append([_escaped(row.label), *(f"{_mean(m)} {_interval(m)}" for m in found)])
    return lines


def _best(rows: Sequence[Row], metric: MetricSpec) -> str | None:
    """The best mean as printed; None for a metric without an order."""
    if metric.higher_is_better is None:
        return None
    means = [row.metrics[metric.name].mean for row in rows]
    # Compared as printed: a difference that the table does not show must not decide.
    return _number(max(means) if metric.higher_is_better else min(means))


def _cells(row: Row) -> list[MetricSummary]:
    return [row.metrics[name] for name in METRIC_NAMES]


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else str(value)


def _mean(metric: MetricSummary) -> str:
    return _number(metric.mean) if metric.std is None else f"{_number(metric.mean)} ± {_number(metric.std)}"


def _interval(metric: MetricSummary) -> str:
    return f"[{_number(metric.low)}, {_number(metric.high)}]"


def _seed_words(rows: Sequence[Row]) -> str:
    sets = {row.seeds for row in rows}
    if len(sets) == 1:
        seeds = next(iter(sets))
        return f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))})"
    counts = sorted({len(seeds) for seeds in sets})
    return f"{' or '.join(map(str, counts))} seeds (not the same for every method)"


def _column_widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _total_width(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _marked(label: str, row: Row, marks: Mapping[str, str]) -> str:
    return " ".join([label, *dict.fromkeys(marks[sentence] for sentence in row.warnings)])


def _notes(marks: Mapping[str, str]) -> list[str]:
    """The footnotes, each with its mark."""
    return [f"{marks[group[0]]} {told_once(group)}" for group in alike(marks)]


def _shortened(label: str, width: int) -> str:
    """A label cut to a width; its marks stay."""
    if len(label) <= width:
        return label
    mark = label[len(label.rstrip(_DIGITS + " ")) :]
    return f"{label[: max(width - 1 - len(mark), 0)]}…{mark}"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    label = _shortened(cells[0], widths[0])
    padded = [label.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True))]
    return _GAP.join(padded).rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    header, *body = lines
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *body))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
