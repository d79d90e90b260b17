"""NLL against the number of labels."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.methods import fit_temperature
from bmoe_lightning.report import MethodResult
from recipes.qwen_obqa.label_budget import BUDGETS, label_budget


def results(size, seed, scale=3.0):
    """A model that is over-confident by a factor, and the temperatures it needs."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, 4, generator=generator, dtype=torch.float64) * 1.5
    target = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    ids = tuple(map(str, range(size)))
    made = []
    for name, extra in (
        ("map", {}),
        ("temperature", {"temperature": 3.0}),
        ("evidence_temperature", {"temperature": 2.8}),
        ("shrunk_temperature", {"temperature": 2.9}),
    ):
        made.append(MethodResult(name, name, 0, (logits * scale).log_softmax(-1), target, ids, extra))
    return made


def by_key(points):
    return {(point.method, point.num_labels): point for point in points}


def test_limits():
    test, calibration = results(400, 1), results(150, 2)
    points = by_key(label_budget(test, calibration))
    assert {budget for _, budget in points} == {*BUDGETS, None}
    plain = -test[0].log_probs.gather(1, test[0].target.unsqueeze(1)).mean()
    assert points["temperature", 0].median == pytest.approx(float(plain))
    assert points["shrunk_temperature", 0].median == points["evidence_temperature", 0].median
    fitted = fit_temperature(calibration[0].log_probs, calibration[0].target)
    expected = (test[0].log_probs / fitted).log_softmax(-1).gather(1, test[0].target.unsqueeze(1)).mean()
    assert points["temperature", None].median == pytest.approx(-float(expected))


def test_shrinking_needs_fewer_labels():
    points = by_key(label_budget(results(400, 1), results(150, 2)))
    assert points["shrunk_temperature", 10].median < points["temperature", 10].median
    assert points["shrunk_temperature", 10].high <= points["temperature", 10].high


def test_budgets_beyond_the_data_are_left_out():
    points = by_key(label_budget(results(100, 1), results(30, 2)))
    assert {budget for _, budget in points} == {0, 10, 25, None}


def test_without_a_method_there_is_no_study():
    assert label_budget(results(50, 1)[:2], results(30, 2)) == []
