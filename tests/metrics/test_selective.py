import math

import pytest
import torch

from bmoe_lightning.metrics import accuracy
from bmoe_lightning.metrics.selective import selective_risk


def predictions(number=83, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(number, 4, generator=generator, dtype=torch.float64)
    target = torch.multinomial((logits / 2).softmax(1), 1, generator=generator).squeeze(1)
    return logits.log_softmax(1), target


def test_against_a_sorted_loop():
    log_probs, target = predictions()
    order = sorted(range(83), key=lambda i: -max(log_probs[i].tolist()))
    wrong = [int(log_probs[i].argmax() != target[i]) for i in order]
    coverages = [0.01, 0.1, 0.25, 0.5, 0.77, 1.0]
    expected = [sum(wrong[: math.ceil(c * 83)]) / math.ceil(c * 83) for c in coverages]
    assert selective_risk(log_probs, target, coverages).tolist() == pytest.approx(expected, abs=1e-12)


def test_full_coverage_is_the_error_rate():
    log_probs, target = predictions()
    assert selective_risk(log_probs, target, [1.0]).item() == pytest.approx(1 - accuracy(log_probs, target).item())


def test_ties_count_with_their_mean_whatever_their_order():
    p = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 4, dtype=torch.float64).log()
    target = torch.tensor([0, 0, 0, 1, 0, 1, 0, 1])
    for order in (torch.arange(8), torch.arange(7, -1, -1)):
        risk = selective_risk(p[order], target[order], [1 / 8, 0.5, 0.75, 1.0])
        assert risk.tolist() == pytest.approx([0.25, 0.25, (1 + 2 * 0.5) / 6, 3 / 8])


def test_rounding_of_the_product_does_not_answer_one_more():
    assert 0.07 * 100 > 7
    log_probs = torch.stack([torch.linspace(0.99, 0.6, 100), 1 - torch.linspace(0.99, 0.6, 100)], 1).double().log()
    log_probs = log_probs.log_softmax(1)
    target = torch.zeros(100, dtype=torch.long)
    target[7] = 1
    assert selective_risk(log_probs, target, [0.07]).item() == 0


@pytest.mark.parametrize("coverage", [0.0, 1.01, -0.5, math.nan])
def test_refuses_coverage_out_of_range(coverage):
    with pytest.raises(ValueError, match="coverages"):
        selective_risk(*predictions(), [coverage])
