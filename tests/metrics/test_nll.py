import pytest
import torch

from bmoe_lightning.metrics.brier import brier_score
from bmoe_lightning.metrics.nll import SPEC, negative_log_likelihood


def test_against_a_loop(predictions):
    log_probs, target = predictions(300)
    nll = -sum(row[y] for row, y in zip(log_probs.tolist(), target.tolist(), strict=True)) / 300
    assert negative_log_likelihood(log_probs, target).item() == pytest.approx(nll, abs=1e-12)


def test_zero_probability_of_the_target_is_infinite_and_said():
    log_probs = torch.tensor([[0.0, -torch.inf], [-0.6931471805599453, -0.6931471805599453]])
    target = torch.tensor([1, 0])
    with pytest.warns(UserWarning, match="1 of 2 examples"):
        assert negative_log_likelihood(log_probs, target) == torch.inf
    assert brier_score(log_probs, target).item() == pytest.approx((2 + 0.5) / 2)


def test_underflowed_probability_keeps_its_log():
    log_probs = torch.tensor([[-1e-30, -1000.0]], dtype=torch.float64)
    assert negative_log_likelihood(log_probs, torch.tensor([1])).item() == 1000.0


def test_lower_is_better():
    assert SPEC.header == "NLL ↓"
