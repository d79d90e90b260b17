"""Which runs the tables and figures need: every model is trained once, whatever number of tables it appears in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from recipes.paper.outcomes import Mode
from recipes.paper.settings import PaperSettings

Entry = str | dict[str, Any]
"""An item of `--methods`: a name, or a class with its options."""

_METHODS: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("methods.yaml").read_text(encoding="utf-8"))
EXPERT_METHODS = tuple(_METHODS["experts"])
"""The paper's methods on a model whose experts were trained, and the controls."""
LORA_METHODS = tuple(_METHODS["lora"])
PRIOR_METHODS = tuple(_METHODS["prior"])
NUM_PARTS = 4
"""Number of parts of the layers, one of which at a time is left out of the posterior."""


@dataclass(frozen=True)
class PlannedRun:
    """A model to train, the methods to fit to it, and where to test them.

    Attributes:
        data: Name of the data set that it is trained on.
        mode: What is trained.
        methods: Methods, in the order of the table.
        others: Names of the data sets that it is tested on besides its own.
    """

    data: str
    mode: Mode
    methods: tuple[Entry, ...]
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.data}-{self.mode}"

    def joined(self, other: PlannedRun) -> PlannedRun:
        """One run for the purposes of both."""
        methods = [*self.methods, *(entry for entry in other.methods if entry not in self.methods)]
        return PlannedRun(self.data, self.mode, tuple(methods), tuple(dict.fromkeys((*self.others, *other.others))))


@dataclass(frozen=True)
class Columns:
    """The data sets of a study.

    Attributes:
        names: All of them, in the order of columns.
        num_layers: Number of expert layers of the model.
    """

    names: tuple[str, ...]
    num_layers: int

    @property
    def home(self) -> str:
        """The data set whose models are tested on all others."""
        return self.names[0]


def layer_parts(num_layers: int) -> list[list[int]]:
    """The indices of the expert layers in four parts, the first layers first.

    Args:
        num_layers: Number of expert layers; with fewer than four there are as many parts, and none of a single layer,
            without which there is no posterior.
    """
    if num_layers < 2:
        return []
    count = min(NUM_PARTS, num_layers)
    bounds = [round(part * num_layers / count) for part in range(count + 1)]
    return [list(range(first, last)) for first, last in pairwise(bounds)]


def without_part(number: int, parts: Sequence[Sequence[int]]) -> Entry:
    """The posterior with LPO that leaves out some layers.

    Args:
        number: Number of the part, counted from 1.
        parts: Indices of the layers of each part.
    """
    return {
        "class_path": "bmoe_lightning.methods.laplace_lpo.LaplaceLPO",
        "init_args": {
            "name": f"laplace_lpo_without_{number}",
            "label": f"Bayesian-MoE without part {number} of {len(parts)}",
            "curvature": {"skip_layers": list(parts[number - 1])},
        },
    }


def _in_distribution(columns: Columns) -> list[PlannedRun]:
    experts = [PlannedRun(name, "experts", EXPERT_METHODS) for name in columns.names]
    return [*experts, *(PlannedRun(name, "lora", LORA_METHODS) for name in columns.names)]


def _shifted(columns: Columns) -> list[PlannedRun]:
    others = columns.names[1:]
    return [
        PlannedRun(columns.home, "experts", EXPERT_METHODS, others),
        PlannedRun(columns.home, "lora", LORA_METHODS, others),
    ]


def _layers(columns: Columns) -> list[PlannedRun]:
    parts = layer_parts(columns.num_layers)
    methods = (*_METHODS["layers"], *(without_part(number, parts) for number in range(1, len(parts) + 1)))
    return [PlannedRun(columns.home, "experts", methods)]


def _priors(columns: Columns) -> list[PlannedRun]:
    return [PlannedRun(name, "experts", PRIOR_METHODS) for name in columns.names]


Experiment = Callable[[Columns], list[PlannedRun]]
TABLE_RUNS: dict[int, Experiment] = {
    1: _in_distribution,
    2: _in_distribution,
    3: _shifted,
    4: _shifted,
    5: _layers,
    6: _priors,
    7: _priors,
}
FIGURE_RUNS: dict[int, Experiment] = {1: _layers}


def planned_runs(settings: PaperSettings, columns: Columns) -> list[PlannedRun]:
    """The runs that the tables and figures need, each model once, the one that is tested on the others first.

    Args:
        settings: Settings.
        columns: Data sets and number of layers.
    """
    makers = [*(TABLE_RUNS[number] for number in settings.tables), *(FIGURE_RUNS[n] for n in settings.figures)]
    runs: dict[str, PlannedRun] = {}
    for run in (run for maker in dict.fromkeys(makers) for run in maker(columns)):
        runs[run.name] = runs[run.name].joined(run) if run.name in runs else run
    return sorted(runs.values(), key=lambda run: (run.data != columns.home, run.mode == "lora"))
