"""How far routes change under noise, beside their own floor and chance."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict

from bmoe_lightning.report import Cell, Grid, GridBlock, GridRow, NumberFormat, stability_figure
from bmoe_lightning.routers.noise_sweep import NoisePlace, Stability
from recipes.common.report_parts import NamedFigure, Section
from recipes.routers.report.section import RouterReport

_TITLE = "Stability of routes"
_PLACES: Mapping[NoisePlace, str] = {
    "embeddings": "noise on the token embeddings, propagated",
    "inputs": "noise on the input of each router alone",
}
_GAMMA = 0.01
_FORMAT = NumberFormat(higher_is_better=True)
_UNORDERED = NumberFormat()


def section(report: RouterReport) -> Section | None:
    """The table, each layer at one size of the noise, and figures; None if nothing was measured.

    Args:
        report: What the report is made from.
    """
    rows = {row: found for row in report.groups if (found := report.stability.get(row))}
    reference = rows.get(report.known.reference)
    if reference is None:
        return None
    gammas = list(next(iter(reference.values())).embeddings)
    chance = statistics.fmean(next(iter(reference.values())).chance.values())
    caption = (
        f"{report.given.model}: mean Jaccard index of the sets of chosen experts over tokens and layers, with and "
        f"without Gaussian noise of standard deviation gamma times the mean norm of what it is added to, on "
        f"{report.routes.num_questions} test questions without padding. A random router has the same random numbers "
        "with and without noise; J0 is the index of two independent draws of it without noise, its own floor, and "
        f"{chance:.2f} that of random sets. With predictions averaged over routes, the mean over routes."
    )
    blocks = tuple(
        GridBlock(
            title,
            (_UNORDERED, *(_FORMAT,) * len(gammas)),
            tuple(
                GridRow(row, report.label(row), (_floor(found), *(_under(found, place, gamma) for gamma in gammas)))
                for row, found in rows.items()
            )
            + (_published(report, gammas) if place == "embeddings" else ()),
        )
        for place, title in _PLACES.items()
    )
    columns = ("J0", *(f"gamma {gamma:g}" for gamma in gammas))
    grid = Grid("stability", caption, "method", columns, blocks)
    figures = tuple(
        NamedFigure(
            f"stability_{place}",
            f"Jaccard index against {title}, by layer; dashed: J0. Means over seeds.",
            lambda place=place: stability_figure(_curves(report, rows, place)),  # type: ignore[misc]
        )
        for place, title in _PLACES.items()
    )
    details = {
        "stability": {
            row: {seed: asdict(stability) for seed, stability in found.items()} for row, found in rows.items()
        }
    }
    return Section(
        _TITLE,
        grids=(grid,),
        linked_grids=(_by_layer(report, rows),),
        figures=figures,
        text=(_layers(report),),
        details=details,
    )


def _by_layer(report: RouterReport, rows: Mapping[str, Mapping[int, Stability]]) -> Grid:
    names = report.routes.layers
    cells = {
        row: tuple(
            Cell.of([stability.embeddings[_GAMMA][name] for stability in found.values()], list(found)) for name in names
        )
        for row, found in rows.items()
    }
    block = GridBlock(
        "", (_FORMAT,) * len(names), tuple(GridRow(row, report.label(row), found) for row, found in cells.items())
    )
    columns = tuple(str(index) for index in range(len(names)))
    caption = f"Mean Jaccard index at gamma {_GAMMA:g} on the embeddings, by expert layer (counted from 0)."
    return Grid("stability_by_layer", caption, "method", columns, (block,))


def _layers(report: RouterReport) -> str:
    indices = ", ".join(map(str, report.routes.susceptible))
    return (
        f"Susceptible layers: {indices} of {len(report.routes.layers)} expert layers, counted from 0: the third "
        f"(rounded up) with the lowest index of {report.label(report.known.reference)} at gamma {_GAMMA:g} on the "
        "embeddings, in the mean over seeds, on calibration questions without their labels."
    )


def _floor(found: Mapping[int, Stability]) -> Cell:
    return Cell.of([statistics.fmean(stability.floor.values()) for stability in found.values()], list(found))


def _under(found: Mapping[int, Stability], place: NoisePlace, gamma: float) -> Cell:
    values = [statistics.fmean(stability.under(place)[gamma].values()) for stability in found.values()]
    return Cell.of(values, list(found))


def _published(report: RouterReport, gammas: list[float]) -> tuple[GridRow, ...]:
    return tuple(
        GridRow(
            f"published {place}",
            f"{entry['label']} (published)",
            (None, *(Cell(entry["index"]) if gamma == _GAMMA else None for gamma in gammas)),
            is_ranked=False,
        )
        for place, entry in enumerate(report.published.get("stability", ()))
    )


def _curves(
    report: RouterReport, rows: Mapping[str, Mapping[int, Stability]], place: NoisePlace
) -> dict[str, tuple[dict[float, dict[str, float]], dict[str, float]]]:
    """By label, the mean index over seeds by gamma and layer, and J0 by layer."""
    found = {}
    for row, of_seeds in rows.items():
        every = list(of_seeds.values())
        curves = {
            gamma: {
                name: statistics.fmean(stability.under(place)[gamma][name] for stability in every) for name in indices
            }
            for gamma, indices in every[0].under(place).items()
        }
        floor = {name: statistics.fmean(stability.floor[name] for stability in every) for name in every[0].floor}
        found[report.label(row)] = (curves, floor)
    return found
