"""The regret of methods that are fitted on calibration splits of several sizes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from bmoe_lightning.curvature import Curvature
from bmoe_lightning.laplace.prior import Scope
from bmoe_lightning.laplace.validation_cache import ValidationCache
from bmoe_lightning.methods import BatchView, Method
from bmoe_lightning.methods.temperature_search import fit_temperature
from bmoe_lightning.methods.workbench import PriorMeanName, Workbench
from bmoe_lightning.metrics import negative_log_likelihood
from bmoe_lightning.utils.atomic_io import write_text
from bmoe_lightning.utils.fit_warnings import collected_fit_warnings
from recipes.calibration_study.cases import CURVATURE, Case, HeldOut

_SEED = 0


@dataclass(frozen=True)
class SplitRegret:
    """How much a method loses on one case when it is fitted on a split of one size.

    Attributes:
        task: Questions of the case.
        kind: Kind of fine-tuning.
        seed: Seed of the case.
        method: Name of the method.
        size: Size of the split; None is the whole.
        value: Test NLL above the smaller of MAP and temperature scaling fitted on the same split, in thousandths of a
            nat, mean over draws; None if the method refuses the split.
    """

    task: str
    kind: str
    seed: int
    method: str
    size: int | None
    value: float | None


class StoredWorkbench:
    """A subset of a case's calibration split, as the fits of methods read it from a `Workbench`.

    Args:
        case: The case.
        chosen: Indices of the questions.
    """

    seed = _SEED

    def __init__(self, case: Case, chosen: Tensor) -> None:
        self._case = case
        self._part = case.calibration.select(chosen)

    def calibration_logits(self) -> tuple[Tensor, Tensor | None]:
        """As of a workbench."""
        return self._part.logits, self._part.labels

    def labelled_logits(self) -> tuple[Tensor, Tensor]:
        """As of a workbench."""
        return self._part.logits, self._part.labels

    def covariances(self, curvature: Curvature) -> ValidationCache:  # noqa: ARG002  (all cases have the same one)
        """As of a workbench."""
        return self._part.cache

    def layer_names(self, curvature: Curvature) -> Sequence[str]:  # noqa: ARG002
        """As of a workbench; a case stores none, so that messages number the layers."""
        return ()

    def evidence_precision(self, curvature: Curvature, scope: Scope, prior_mean: PriorMeanName) -> Tensor:  # noqa: ARG002
        """As of a workbench; the prior mean is the weights before fine-tuning."""
        return self._case.precisions[scope]


class StoredBatch:
    """The test split of a case, as predictions read it from a `BatchView`."""

    seed = _SEED

    def __init__(self, part: HeldOut) -> None:
        self.logits, self.labels = part.logits, part.labels
        self._cache = part.cache

    def covariance(self, curvature: Curvature, prior_precision: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """As of a batch view."""
        return self.logits, self._cache.covariance(prior_precision)


def measurable(method: Method) -> bool:
    """Whether a method uses nothing but what is stored of a case."""
    needs = method.needs
    others = needs.snapshots or needs.max_snapshots or needs.runs or needs.expert_dropout or needs.routers
    return not others and not method.is_ensemble and {c.digest for c in method.curvatures} <= {CURVATURE.digest}


def split_regrets(
    cases: Iterable[Case], methods: Sequence[Method], sizes: Sequence[int], draws: int, folder: Path
) -> list[SplitRegret]:
    """The regret of every method on every case and split size; those that are in the folder are not measured again.

    Args:
        cases: The cases.
        methods: Methods that are `measurable`.
        sizes: Sizes of the split, beside the whole.
        draws: Draws of each size.
        folder: Folder of finished measurements.
    """
    found = []
    for case in cases:
        store = _Store(folder / f"{case.task}-{case.kind}-{case.seed}.json".replace(" ", "_"))
        count = len(case.calibration.labels)
        for size in (*(size for size in sizes if size < count), None):
            for method in methods:
                key = json.dumps([size, draws, method.fit_options(), method.options()], sort_keys=True)
                if key not in store.values:
                    store.add(key, _regret(case, method, size, draws if size else 1))
                found.append(SplitRegret(case.task, case.kind, case.seed, method.name, size, store.values[key]))
    return found


class _Store:
    """Finished measurements of one case in a JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, float | None] = json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def add(self, key: str, value: float | None) -> None:
        self.values[key] = value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps(self.values, indent=1) + "\n")


def _regret(case: Case, method: Method, size: int | None, draws: int) -> float | None:
    count, total = len(case.calibration.labels), 0.0
    for draw in range(draws):
        generator = torch.Generator().manual_seed(10_000 * case.seed + 100 * draw + (size or 0))
        chosen = torch.randperm(count, generator=generator)[:size]
        work, batch = StoredWorkbench(case, chosen), StoredBatch(case.test)
        with collected_fit_warnings():
            reference = min(_loss(case, 1.0), _loss(case, fit_temperature(*work.labelled_logits())))
            try:
                state = method.fit(cast(Workbench, work))
            except ValueError:
                return None
        log_probs = method.log_probs(cast(BatchView, batch), state)
        total += float(negative_log_likelihood(log_probs, case.test.labels)) - reference
    return 1000 * total / draws


def _loss(case: Case, temperature: float) -> float:
    return float(negative_log_likelihood((case.test.logits / temperature).log_softmax(-1), case.test.labels))
