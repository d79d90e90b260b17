"""The comparison in TensorBoard: one sub-run for each method with the same tags, which TensorBoard overlays."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from bmoe_lightning.metrics import selective_risk
from bmoe_lightning.report.figures import (
    comparison_card,
    figure_image,
    matplotlib_available,
    pooled_curve,
    reliability_panels,
    well_filled,
)
from bmoe_lightning.report.files import check_rows_match
from bmoe_lightning.report.results import HyperparameterValue, MethodResult, Row, by_method
from bmoe_lightning.report.table import results_markdown
from bmoe_lightning.utils.late_import import how_to_install

_logger = logging.getLogger(__name__)
_COVERAGES = range(5, 101, 5)
_HOW_TO_READ = """\
Set **Smoothing** to 0: the curves have few points, and a smoothed one shows other values.

- `best_method/nll`: methods from the lowest NLL to the highest, with the interval of each mean.
- `reliability/all_methods`: accuracy over confidence; a method is calibrated on the diagonal, overconfident below it.
- `reliability/accuracy_by_confidence`: the step is the middle of a confidence bin in %; calibrated is step / 100.
- `reliability/gap_by_confidence`: accuracy minus confidence over the same step; calibrated is 0, overconfident below.
- `selective/risk`: error rate when only the most confident answers are given; the step is the share answered in %.
- `test/...`: means over seeds; the HParams tab has them as a table, a row a method.

Both `by_confidence` curves leave out bins with less than 2 % of the items.
"""


def write_tensorboard(
    log_dir: str | Path,
    results: Sequence[MethodResult],
    rows: Sequence[Row],
    *,
    hyperparameters: Mapping[str, HyperparameterValue] | None = None,
    step: int = 0,
) -> None:
    """Write the comparison, into a new log directory: TensorBoard draws the events of two calls on one curve.

    The run `log_dir` itself gets, as the first card of the page, the comparison of the methods by
    NLL (`best_method/nll`), their reliability diagrams, the table with all further numbers, and a note on how to
    read the page. Each sub-run `log_dir/<method>` gets the headline metrics as `test/<metric>` (means over seeds), one
    HParams row with them and the method's options, and curves whose step is a percentage:
    `reliability/accuracy_by_confidence` and `reliability/gap_by_confidence` (accuracy minus confidence; zero is
    calibrated) over confidence, in well-filled bins, and `selective/risk` over coverage. Without matplotlib the figures
    are left out, with one warning.

    Args:
        log_dir: Parent of the sub-runs; created if missing.
        results: What the rows were made from.
        rows: From `summarise`.
        hyperparameters: Settings shared by all methods; the options of a method (`MethodResult.hyperparameters`)
            override them.
        step: Step of the test metrics; the trainer's last, to share an axis with training curves.

    Raises:
        ValueError: If rows and results do not match, or the directory has an earlier comparison.
    """
    check_rows_match(results, rows)
    if has_comparison(log_dir):
        raise ValueError(f"{log_dir} has a comparison already, and TensorBoard would mix the two; pass another log_dir")
    with_figures = matplotlib_available()
    if not with_figures:
        _logger.warning("matplotlib is not installed, figures are left out; %s", how_to_install("plots"))
    settings = {row.method: {**(hyperparameters or {}), **row.hyperparameters} for row in rows}
    # TensorBoard reads the columns of the HParams table from one run only, so every run declares the columns of all.
    columns = {key: value for of_method in settings.values() for key, value in of_method.items()}
    groups = by_method(results)
    for row in rows:
        with SummaryWriter(str(Path(log_dir) / row.method)) as writer:
            _write_scores(writer, row, settings[row.method], columns, step)
            _write_curves(writer, groups[row.method], row)
    with SummaryWriter(str(log_dir)) as writer:
        writer.add_text("results", _unbroken(results_markdown(rows)), step)
        writer.add_text("how_to_read", _HOW_TO_READ, step)
        if with_figures:
            # TensorBoard sorts cards by name: this one is to be the first.
            writer.add_image("best_method/nll", figure_image(comparison_card(rows)), step)
            writer.add_image("reliability/all_methods", figure_image(reliability_panels(results, rows)), step)


def has_comparison(log_dir: str | Path) -> bool:
    """Whether a log directory has events of an earlier comparison, which may have been interrupted.

    Args:
        log_dir: Log directory of `write_tensorboard`, which need not exist.
    """
    events = "events.out.tfevents.*"
    # The sub-runs of the methods are written first.
    return any(path for pattern in (events, f"*/{events}") for path in Path(log_dir).glob(pattern))


def _write_scores(
    writer: SummaryWriter,
    row: Row,
    settings: Mapping[str, HyperparameterValue],
    columns: Mapping[str, HyperparameterValue],
    step: int,
) -> None:
    scores = {f"test/{name}": metric.mean for name, metric in row.metrics.items()}
    for tag, value in scores.items():
        writer.add_scalar(tag, value, step)
    # Not add_hparams, which writes into an additional sub-run named after the time.
    experiment, _, _ = hparams({"method": row.method, **_readable(columns)}, scores)
    _, start, end = hparams({"method": row.method, **_readable(settings)}, scores)
    for summary in (experiment, start, end):
        writer._get_file_writer().add_summary(summary)


def _readable(settings: Mapping[str, HyperparameterValue]) -> dict[str, HyperparameterValue]:
    # torch writes a bool as 1.0.
    return {key: str(value).lower() if isinstance(value, bool) else value for key, value in settings.items()}


def _write_curves(writer: SummaryWriter, group: Sequence[MethodResult], row: Row) -> None:
    curve = well_filled(pooled_curve(group, row))
    middles = (curve.bin_edges[1:] + curve.bin_edges[:-1]) / 2
    for bin_ in (curve.count > 0).nonzero().flatten().tolist():
        percent = round(100 * float(middles[bin_]))
        accuracy, confidence = float(curve.accuracy[bin_]), float(curve.confidence[bin_])
        writer.add_scalar("reliability/accuracy_by_confidence", accuracy, percent)
        writer.add_scalar("reliability/gap_by_confidence", accuracy - confidence, percent)
    coverages = [percent / 100 for percent in _COVERAGES]
    risk = torch.stack([selective_risk(r.log_probs, r.target, coverages).cpu() for r in group]).mean(dim=0)
    for percent, value in zip(_COVERAGES, risk.tolist(), strict=True):
        writer.add_scalar("selective/risk", value, percent)


def _unbroken(markdown: str) -> str:
    # Non-breaking spaces: the page is narrow, and an interval on two lines is hard to read.
    return re.sub(r" ± |(?<=\d), (?=[\d-]+\.\d+\])", lambda match: match[0].replace(" ", "\u00a0"), markdown)
