"""Where the variance of predictions comes from: layers x experts, and the tokens of each expert beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bmoe_lightning.report import (
    AttributionMap,
    Cell,
    Grid,
    GridBlock,
    GridRow,
    NumberFormat,
    attribution_figure,
    attribution_map,
)
from bmoe_lightning.report.attribution import LayerParts
from recipes.common.report_parts import NamedFigure, Section
from recipes.paper.report.section import ReportInput

_TITLE = "Where the uncertainty comes from"
_UNMADE = (
    "Not made. Run the command that made the study again, on one process: it repeats no finished run, and attributes "
    "the predictions of a model whose fine-tuned weights the study still has."
)
_COLUMNS = ("share of the variance (%)", "largest share of one expert (%)", "experts with tokens", "routed tokens")
_PERCENT, _COUNT = NumberFormat(digits=1, scale=100), NumberFormat(digits=0)
_HOW = (
    "The variance is that of the centred logits under the posterior, a mean over the test questions, and the parts add "
    "up to it exactly; tokens are counted where they affect a logit. The parts say which weights the variance is due "
    "to, and not what would happen without these weights."
)


@dataclass(frozen=True, eq=False)
class Attributed:
    """The parts of all layers and experts in the variance of one method's predictions of one model.

    Attributes:
        method: Name of the method.
        seed: Seed of the model.
        layers: Part of each layer, for all test questions.
    """

    method: str
    seed: int
    layers: Sequence[LayerParts]


def section(report: ReportInput) -> Section | None:
    """The figure, and a row for each layer; None if the study does not have the method whose layers are looked at.

    Args:
        report: What the report is made from.
    """
    home, found = report.study.home, report.attribution
    groups = report.groups(home, home)
    if report.compared.layers not in groups:
        return None
    if found is None or found.method not in groups:
        return Section(_TITLE, text=(_UNMADE,))
    of_experts = attribution_map(found.layers)
    what = (
        f"{report.model}, trained and tested on {report.label(home)}, seed {found.seed}: parts of the variance under "
        f"{groups[found.method][0].label}"
    )
    rows = tuple(_row(of_experts, position) for position in range(len(of_experts.layers)))
    formats = (_PERCENT, _PERCENT, _COUNT, _COUNT)
    grid = Grid("attribution", f"{what}, by layer.", "layer", _COLUMNS, (GridBlock("", formats, rows),))
    figure = NamedFigure(
        "attribution",
        f"{what}, by layer and expert; beside them the tokens that were routed to each expert.",
        lambda: attribution_figure(found.layers),
    )
    details = {
        "attribution": {
            "method": found.method,
            "seed": found.seed,
            "layers": of_experts.layers,
            "variance": _values(of_experts.variance.tolist()),
            "slots": _values(of_experts.slots.tolist()),
        }
    }
    return Section(_TITLE, grids=(grid,), figures=(figure,), text=(_HOW,), details=details)


def _row(found: AttributionMap, position: int) -> GridRow:
    variance, slots = found.variance[position], found.slots[position]
    total = found.variance.nansum()
    shares = (variance.nansum() / total, variance[~variance.isnan()].max() / total)
    cells = (*map(float, shares), int((slots > 0).sum()), int(slots.nansum()))
    index = str(found.layers[position])
    return GridRow(index, index, tuple(map(Cell, cells)))


def _values(rows: Sequence[Sequence[float]]) -> list[list[float | None]]:
    """Rows in which a layer has no value for experts that only others have."""
    return [[None if value != value else value for value in row] for row in rows]
