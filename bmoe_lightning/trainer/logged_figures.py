"""Figures of a test for the loggers of Lightning that have images, TensorBoard aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from bmoe_lightning.report import MethodResult, Row, matplotlib_available, reliability_panels
from bmoe_lightning.report.figures import comparison_card, figure_image

FigureWriter = Callable[[str, Any, int], None]
"""Writes a figure: its name, the figure of matplotlib, and the number of training steps."""


def figure_writers(loggers: Sequence[Logger], prefix: str = "") -> list[FigureWriter]:
    """What writes figures to W&B and MLflow; other loggers, and all of them without matplotlib, get none.

    Args:
        loggers: Loggers of a trainer.
        prefix: Prefix of all names, or empty.
    """
    place = f"{prefix}/" if prefix else ""
    found: list[FigureWriter] = []
    for logger in loggers if matplotlib_available() else ():
        if isinstance(logger, WandbLogger):
            found.append(partial(_write_wandb, logger, place))
        elif isinstance(logger, MLFlowLogger):
            found.append(partial(_write_mlflow, logger, place))
    return found


def log_figures(
    writers: Sequence[FigureWriter], results: Sequence[MethodResult], rows: Sequence[Row], name: str, step: int
) -> None:
    """Log the comparison of the methods by NLL, and their reliability diagrams.

    Args:
        writers: From `figure_writers`.
        results: What the rows were made from.
        rows: From `summarise`.
        name: Name of the loader, with which the figures' names begin.
        step: Number of training steps.
    """
    if not writers:
        return
    figures = {"best_method/nll": comparison_card(rows), "reliability/all_methods": reliability_panels(results, rows)}
    for key, figure in figures.items():
        for write in writers:
            write(f"{name}/{key}", figure, step)


def _write_wandb(logger: WandbLogger, place: str, key: str, figure: Any, step: int) -> None:
    # Pixels, since W&B would make an interactive figure of another library of it.
    logger.log_image(f"{place}{key}", [figure_image(figure).permute(1, 2, 0).numpy()], step=step)


def _write_mlflow(logger: MLFlowLogger, place: str, key: str, figure: Any, step: int) -> None:
    logger.experiment.log_figure(logger.run_id, figure, f"{place}{key}-{step}.png")
