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
    figure_image,
    matplotlib_available,
    pooled_curve,
    reliability_figure,
    reliability_overlay,
    well_filled,
)
from bmoe_lightning.report.files import check_rows_match
from bmoe_lightning.report.results import HyperparameterValue, MethodResult, Row, by_method
from bmoe_lightning.report.styles import method_styles
from bmoe_lightning.report.table import results_markdown

_logger = logging.getLogger(__name__)
_COVERAGES = range(5, 101, 5)
_HOW_TO_READ = """\
Set **Smoothing** to 0: the curves have few points, and a smoothed one shows other values.

- `calibration/accuracy_by_confidence`: the step is the middle of a confidence bin in %; calibrated is step / 100.
- `calibration/gap_by_confidence`: accuracy minus confidence over the same step; calibrated is 0, overconfident below.
- `selective/risk`: error rate when only the most confident answers are given; the step is the share answered in %.
- `test/...`: means over seeds; the HParams tab has them as a table, a row a method.

Both `calibration` curves leave out bins with less than 2 % of the items.
"""


def write_tensorboard(
    log_dir: str | Path,
    results: Sequence[MethodResult],
    rows: Sequence[Row],
    *,
    hyperparameters: Mapping[str, HyperparameterValue] | None = None,
    step: int = 0,
) -> None:
    """Write the comparison; call it once for each log directory, at the end, since TensorBoard adds up event files.

    Each sub-run `log_dir/<method>` gets the headline metrics as `test/<metric>` (means over seeds), further numbers
    under `extra/`, one HParams row with all headline metrics and the method's options, a reliability diagram, and
    curves whose step is a percentage: `calibration/accuracy_by_confidence` and `calibration/gap_by_confidence`
    (accuracy minus confidence; zero is calibrated) over confidence, in well-filled bins, and `selective/risk` over
    coverage. The run `log_dir` itself gets the table, a note on how to read the page, and the reliability curves of all
    methods on one pair of axes. Without matplotlib the figures are left out, with one warning.

    Args:
        log_dir: Parent of the sub-runs; created if missing.
        results: What the rows were made from.
        rows: From `summarise`.
        hyperparameters: Settings shared by all methods; the options of a method (`MethodResult.hyperparameters`)
            override them.
        step: Step of the test metrics; the trainer's last, to share an axis with training curves.

    Raises:
        ValueError: If rows and results do not match.
    """
    check_rows_match(results, rows)
    with_figures = matplotlib_available()
    if not with_figures:
        _logger.warning("matplotlib is not installed, figures are left out; pip install 'bmoe-lightning[plots]'")
    settings = {row.method: {**(hyperparameters or {}), **row.hyperparameters} for row in rows}
    # TensorBoard reads the columns of the HParams table from one run only, so every run declares the columns of all.
    columns = {key: value for of_method in settings.values() for key, value in of_method.items()}
    groups, styles = by_method(results), method_styles([row.method for row in rows])
    for row in rows:
        with SummaryWriter(str(Path(log_dir) / row.method)) as writer:
            _write_scores(writer, row, settings[row.method], columns, step)
            _write_curves(writer, groups[row.method], row)
            if with_figures:
                figure = reliability_figure(groups[row.method], row, styles[row.method])
                writer.add_image("reliability/diagram", figure_image(figure), step)
    with SummaryWriter(str(log_dir)) as writer:
        writer.add_text("results", _unbroken(results_markdown(rows)), step)
        writer.add_text("how_to_read", _HOW_TO_READ, step)
        if with_figures:
            writer.add_image("reliability/all_methods", figure_image(reliability_overlay(results, rows)), step)


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
    for name, value in row.extra.items():
        writer.add_scalar(f"extra/{name}", value, step)
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
        writer.add_scalar("calibration/accuracy_by_confidence", accuracy, percent)
        writer.add_scalar("calibration/gap_by_confidence", accuracy - confidence, percent)
    coverages = [percent / 100 for percent in _COVERAGES]
    risk = torch.stack([selective_risk(r.log_probs, r.target, coverages).cpu() for r in group]).mean(dim=0)
    for percent, value in zip(_COVERAGES, risk.tolist(), strict=True):
        writer.add_scalar("selective/risk", value, percent)


def _unbroken(markdown: str) -> str:
    # Non-breaking spaces: the page is narrow, and an interval on two lines is hard to read.
    return re.sub(r" ± |(?<=\d), (?=[\d-]+\.\d+\])", lambda match: match[0].replace(" ", "\u00a0"), markdown)
