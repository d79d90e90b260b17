"""What the parts of the report are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bmoe_lightning.metrics import get_metric
from bmoe_lightning.report import Cell, MethodResult
from bmoe_lightning.routers.noise_sweep import Stability
from recipes.paper.outcomes import Study
from recipes.paper.report import Costs
from recipes.paper.report.compared import Bar, Compared
from recipes.paper.report.published import Published
from recipes.paper.report.section import Groups, ReportInput
from recipes.routers.methods import Known, base_of, read_known
from recipes.routers.presets import PRESETS
from recipes.routers.stored_routes import Routes

_PUBLISHED = Path(__file__).parents[1] / "published.yaml"


@dataclass(frozen=True)
class RouterReport:
    """What the report is made from.

    Attributes:
        given: Predictions, claims and measured costs.
        routes: What the study knows of its routers.
        stability: By method and seed.
        known: Methods that are known by name.
        published: Numbers of publications with this model and these data, by table; empty for another set-up.
    """

    given: ReportInput
    routes: Routes
    stability: Mapping[str, Mapping[int, Stability]]
    known: Known
    published: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        study: Study,
        routes: Routes,
        stability: Mapping[str, Mapping[int, Stability]],
        costs: Costs | None = None,
        published: Path = _PUBLISHED,
    ) -> RouterReport:
        """The report of a study.

        Args:
            study: Its predictions.
            routes: What it knows of its routers.
            stability: Stability of routes by method and seed.
            costs: Measured costs.
            published: File of the publications' numbers.
        """
        known = read_known()
        rows = list(dict.fromkeys(result.method for outcome in study.outcomes for result in outcome.results))
        compared = Compared(known.reference, tuple(rows), known.reference, {}, tuple(_claims(rows, routes, known)))
        given = ReportInput(study, compared, Published(), costs)
        return cls(given, routes, stability, known, _published(study, published))

    @property
    def groups(self) -> Groups:
        """Results in distribution, by row."""
        return self.given.groups(self.given.study.home, self.given.study.home)

    def is_random(self, row: str) -> bool:
        """Whether the routers of a row are random."""
        return base_of(row, self.routes.names) is not None

    def selection_of(self, row: str) -> str | None:
        """The name of the layers that a row's random routers are restricted to; None if they are in all."""
        found = [name for name in self.routes.selections if row.endswith(f"_{name}")]
        return max(found, key=len, default=None) if self.is_random(row) else None

    def on_all_layers(self) -> Iterator[tuple[str, Sequence[MethodResult]]]:
        """The rows whose routers are not restricted to some layers."""
        return ((row, group) for row, group in self.groups.items() if self.selection_of(row) is None)

    def label(self, row: str) -> str:
        """Display name of a row."""
        return self.groups[row][0].label


def cell(group: Sequence[MethodResult], value: Callable[[MethodResult], float]) -> Cell:
    """A number of each result of a row.

    Args:
        group: Results over seeds.
        value: Function of a result.
    """
    return Cell.of([value(result) for result in group], [result.seed for result in group])


def metric_cell(report: RouterReport, group: Sequence[MethodResult], metric: str) -> Cell:
    """A metric of a row.

    Args:
        report: What the report is made from.
        group: Results over seeds.
        metric: Name of the metric.
    """
    spec, binning = get_metric(metric), report.given.settings.binning
    return cell(group, lambda result: float(spec.value(result.log_probs, result.target, binning)))


def _claims(rows: Sequence[str], routes: Routes, known: Known) -> Iterator[Bar]:
    """What is claimed of every random router: better than untrained noise, and than each control without noise.

    Variants of a method are compared with noise alone: in the same layers, for rows of some layers.
    """
    plain = [row for row in rows if row in (*known.plain, known.trained_name)]
    for row in rows:
        base = base_of(row, routes.names)
        if base is None:
            continue
        if base != known.noise:
            selection = row.removeprefix(f"{base}_")
            alike = f"{known.noise}_{selection}"
            noise = alike if selection in routes.selections and alike in rows else known.noise
            if noise in rows:
                yield Bar("better than untrained noise", "lower", row, (noise,), "in_distribution")
        if row in routes.names:
            for other in plain:
                yield Bar("better than the control without random routers", "lower", row, (other,), "in_distribution")


def _published(study: Study, path: Path) -> Mapping[str, Any]:
    """The numbers of publications on a preset's own model; none for another one, or a dry run."""
    for name, preset in PRESETS.items():
        if study.preset.endswith(f", {name}") and study.model == preset.label:
            found: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")).get(name, {})
            return found
    return {}
