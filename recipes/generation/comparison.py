"""What each score is worth, and its difference to the probability of the answer: means over seeds with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from bmoe_lightning.metrics import Estimate, prediction_rejection_ratio, weighted_rejection_ratio
from bmoe_lightning.metrics.base import WeightedValue
from bmoe_lightning.metrics.bootstrap import draw_resamples
from bmoe_lightning.metrics.detection import detection_values, weighted_detection
from bmoe_lightning.report import SeedValues, SummarySettings, seed_difference
from recipes.generation.experiment import ScoredAnswers

BASELINE = "sequence_probability"
"""The score that all others are compared with."""


@dataclass(frozen=True)
class ScoreValue:
    """A measure of one score on one task.

    Attributes:
        estimate: Mean over seeds, with its interval over new questions and new seeds.
        difference: The same less that of the baseline, paired by question and seed; None for the baseline.
        by_seed: The value of each seed.
    """

    estimate: Estimate
    difference: Estimate | None
    by_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """Whether the difference is decided, in words."""
        if self.difference is None:
            return "baseline"
        if self.difference.low > 0:
            return "better"
        return "worse" if self.difference.high < 0 else "no difference is decided"


@dataclass(frozen=True)
class TaskComparison:
    """All scores on one task.

    Attributes:
        task: Name of the task.
        seeds: Seeds of the models.
        num_questions: Number of questions N.
        accuracy: Share of right answers of each seed.
        values: Values by score and measure (`prr`, `auroc`).
        curvature: What the curvature adds, by measure: the variance under the posterior less the isotropic one.
    """

    task: str
    seeds: tuple[int, ...]
    num_questions: int
    accuracy: tuple[float, ...]
    values: Mapping[str, Mapping[str, ScoreValue]]
    curvature: Mapping[str, Estimate]


@dataclass(frozen=True)
class Measure:
    """A measure of how well a score finds wrong answers, higher is better.

    Attributes:
        title: Title of its column.
        on_data: Function `(score [N], right [N]) -> value`.
        weighted: Function `(score [N], right [N]) -> (multiplicities [R, N] -> [R])`.
    """

    title: str
    on_data: Callable[[Tensor, Tensor], float]
    weighted: Callable[[Tensor, Tensor], WeightedValue]


MEASURES: Mapping[str, Measure] = {
    "prr": Measure(
        "PRR",
        lambda score, right: prediction_rejection_ratio(score, right.double()),
        lambda score, right: weighted_rejection_ratio(score, right.double()),
    ),
    "auroc": Measure(
        "AUROC",
        lambda score, right: detection_values(score, ~right)["auroc"],
        lambda score, right: weighted_detection(score, ~right)["auroc"],
    ),
}
"""Prediction rejection ratio, and AUROC of wrong answers (positive) against right ones."""


def compare(answers: Sequence[ScoredAnswers], settings: SummarySettings) -> list[TaskComparison]:
    """Compare the scores of each task with the baseline.

    Args:
        answers: Scored answers, those of a task after one another.
        settings: Number of resamples, level and seed of the bootstrap.
    """
    return [_compared(task, list(of_task), settings) for task, of_task in groupby(answers, lambda found: found.task)]


def _compared(task: str, answers: Sequence[ScoredAnswers], settings: SummarySettings) -> TaskComparison:
    count = len(answers[0].right)
    counts = torch.cat([drawn.counts for drawn in draw_resamples(count, settings.num_samples, settings.bootstrap_seed)])
    values: dict[str, dict[str, ScoreValue]] = {name: {} for name in answers[0].scores}
    curvature = {}
    for measure_name, measure in MEASURES.items():
        of_scores = {name: _seed_values(measure, name, answers, counts) for name in values}
        baseline = of_scores[BASELINE]
        nothing = SeedValues(torch.zeros_like(baseline.on_data), torch.zeros_like(baseline.on_resamples))
        for name, found in of_scores.items():
            difference = None if name == BASELINE else seed_difference(found, baseline, settings)
            estimate = seed_difference(found, nothing, settings)
            values[name][measure_name] = ScoreValue(estimate, difference, tuple(found.on_data.tolist()))
        with_curvature, without = (of_scores[name] for name in ("posterior_variance", "isotropic_variance"))
        curvature[measure_name] = seed_difference(with_curvature, without, settings)
    accuracy = tuple(float(of_seed.right.double().mean()) for of_seed in answers)
    return TaskComparison(task, tuple(of_seed.seed for of_seed in answers), count, accuracy, values, curvature)


def _seed_values(measure: Measure, name: str, answers: Sequence[ScoredAnswers], counts: Tensor) -> SeedValues:
    on_data = [measure.on_data(of_seed.scores[name], of_seed.right) for of_seed in answers]
    on_resamples = [measure.weighted(of_seed.scores[name], of_seed.right)(counts) for of_seed in answers]
    return SeedValues(torch.tensor(on_data, dtype=torch.float64), torch.stack(on_resamples, dim=1))
