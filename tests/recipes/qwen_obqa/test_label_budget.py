"""NLL against the number of labels."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.curvature import Curvature
from bmoe_lightning.methods import FitResult, get_method
from bmoe_lightning.methods.base import scalar
from bmoe_lightning.methods.fit_result import FittedMethod
from bmoe_lightning.methods.temperature_search import fit_temperature
from bmoe_lightning.report import MethodResult
from recipes.qwen_obqa.label_budget import BUDGETS, label_budget

CURVATURE = Curvature()
STATES = {
    "map": {},
    "laplace_lpo": {"prior_precision": torch.ones(2, dtype=torch.float64)},
    "temperature": {"temperature": scalar(3.0)},
    "evidence_temperature": {"temperature": scalar(2.8)},
    "shrunk_temperature": {"temperature": scalar(2.9)},
}


def data(size, seed, scale=3.0):
    """Logits of a model that is over-confident by a factor, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, 4, generator=generator, dtype=torch.float64) * 1.5
    return logits * scale, torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def points_of(test_size, calibration_size, names=tuple(STATES), draws=2):
    methods = [get_method(name).with_defaults(CURVATURE) for name in names]
    fitted = {
        method.name: FittedMethod(
            STATES[method.name], method.fit_options(), tuple(curvature.digest for curvature in method.curvatures)
        )
        for method in methods
    }
    fit = FitResult(methods=fitted, posteriors={CURVATURE.digest: object()}, calibration=data(calibration_size, 2))
    logits, target = data(test_size, 1)
    result = MethodResult("map", "MAP", 0, logits.log_softmax(-1), target, tuple(map(str, range(test_size))))
    points = label_budget(methods, {0: fit}, {0: logits}, [result], draws=draws)
    return {(point.method, point.num_labels): point for point in points}


def test_limits():
    points = points_of(400, 150)
    assert {budget for _, budget in points} == {*BUDGETS, None}
    logits, target = data(400, 1)
    plain = -logits.log_softmax(-1).gather(1, target.unsqueeze(1)).mean()
    assert points["temperature", 0].median == pytest.approx(float(plain))
    without = (logits / 2.5).log_softmax(-1).gather(1, target.unsqueeze(1)).mean()
    assert points["shrunk_temperature", 0].median == pytest.approx(-float(without))
    scaled = (logits / fit_temperature(*data(150, 2))).log_softmax(-1).gather(1, target.unsqueeze(1)).mean()
    assert points["temperature", None].median == pytest.approx(-float(scaled))


def test_methods_that_need_more_than_logits_are_left_out():
    assert list(dict.fromkeys(method for method, _ in points_of(400, 150))) == [
        "temperature", "evidence_temperature", "shrunk_temperature",
    ]  # fmt: skip
    assert points_of(50, 30, names=("map", "laplace_lpo")) == {}


def test_shrinking_needs_fewer_labels():
    points = points_of(400, 150, draws=20)
    assert points["shrunk_temperature", 10].median < points["temperature", 10].median
    assert points["shrunk_temperature", 10].high <= points["temperature", 10].high


def test_budgets_beyond_the_data_are_left_out():
    assert {budget for _, budget in points_of(100, 30)} == {0, 10, 25, None}


def test_without_held_out_labels_there_is_no_study():
    logits, target = data(50, 1)
    result = MethodResult("map", "MAP", 0, logits.log_softmax(-1), target, tuple(map(str, range(50))))
    assert label_budget([get_method("map")], {0: FitResult()}, {0: logits}, [result]) == []
