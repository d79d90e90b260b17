import itertools
import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from bmoe_lightning.metrics import accuracy
from bmoe_lightning.metrics.selective import (
    area_under_generalised_risk_coverage,
    area_under_risk_coverage,
    coverage_at_risk,
    excess_area_under_risk_coverage,
    selective_risk,
)


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


def risks(wrong):
    """Selective risks of errors in order of falling confidence."""
    return np.cumsum(wrong) / np.arange(1, len(wrong) + 1)


def in_order(wrong, confidence=None):
    """Two classes, the top label is class 0."""
    number = len(wrong)
    p = torch.linspace(0.99, 0.6, number, dtype=torch.float64) if confidence is None else torch.tensor(confidence)
    p = p.double()
    return torch.stack([p, 1 - p], 1).log(), torch.tensor(wrong, dtype=torch.long)


class TestAgainstNumPy:
    @pytest.mark.parametrize("seed", range(3))
    def test_aurc_and_excess(self, seed):
        log_probs, target = predictions(seed=seed)
        wrong = (log_probs.argmax(1) != target).numpy().astype(float)[np.argsort(-log_probs.max(1).values.numpy())]
        best = np.sort(wrong)
        assert area_under_risk_coverage(log_probs, target).item() == pytest.approx(risks(wrong).mean(), abs=1e-12)
        excess = excess_area_under_risk_coverage(log_probs, target).item()
        assert excess == pytest.approx(risks(wrong).mean() - risks(best).mean(), abs=1e-12)
        assert excess > 0.01

    @pytest.mark.parametrize("seed", range(3))
    def test_augrc_by_trapezoids_and_by_its_identity_with_the_auroc(self, seed):
        log_probs, target = predictions(seed=seed)
        confidence = (log_probs.max(1).values * 2).round() / 2  # many ties
        log_probs = torch.stack([confidence.exp().clamp(max=0.99), 1 - confidence.exp().clamp(max=0.99)], 1).log()
        log_probs, target = log_probs[confidence > -0.6], target[confidence > -0.6].clamp(max=1)
        assert 1 < len(log_probs.unique()) < len(log_probs)
        a = accuracy(log_probs, target).item()
        auroc = binary_auroc(1 - log_probs[:, 0].exp(), target).item()
        value = area_under_generalised_risk_coverage(log_probs, target).item()
        assert value == pytest.approx(a * (1 - a) * (1 - auroc) + (1 - a) ** 2 / 2, abs=1e-6)
        log_probs, target = predictions(seed=seed)
        wrong = (log_probs.argmax(1) != target).numpy().astype(float)[np.argsort(-log_probs.max(1).values.numpy())]
        curve = np.concatenate([[0.0], np.cumsum(wrong) / 83])
        value = area_under_generalised_risk_coverage(log_probs, target).item()
        assert value == pytest.approx((curve[1:] + curve[:-1]).sum() / 2 / 83, abs=1e-12)

    @pytest.mark.parametrize("risk", [0.0, 0.05, 0.1, 0.25, 0.5, 1.0])
    def test_coverage_at_risk(self, risk):
        for seed in range(5):
            log_probs, target = predictions(seed=seed)
            wrong = (log_probs.argmax(1) != target).numpy().astype(float)[np.argsort(-log_probs.max(1).values.numpy())]
            fine = np.flatnonzero(risks(wrong) <= risk)
            expected = (fine[-1] + 1) / 83 if len(fine) else 0.0
            assert coverage_at_risk(log_probs, target, risk=risk).item() == pytest.approx(expected, abs=1e-12)


def test_ties_are_the_mean_over_all_orders():
    wrong = [0, 1, 0, 1, 1, 0]
    confidence = [0.9, 0.9, 0.9, 0.7, 0.7, 0.6]
    curves = []
    for order in itertools.permutations(range(6)):
        if [confidence[i] for i in order] == confidence:
            curves.append(risks([wrong[i] for i in order]))
    mean = np.mean(curves, axis=0)
    log_probs, target = in_order(wrong, confidence)
    assert area_under_risk_coverage(log_probs, target).item() == pytest.approx(mean.mean(), abs=1e-12)
    for risk in np.linspace(0, 1, 23):
        fine = np.flatnonzero(mean <= risk + 1e-9)
        expected = (fine[-1] + 1) / 6 if len(fine) else 0.0
        assert coverage_at_risk(log_probs, target, risk=risk).item() == pytest.approx(expected)


def test_an_error_at_the_top_does_not_end_the_coverage():
    """100 items, only the most confident one wrong: a risk of 5 % is reached from coverage .2 on."""
    assert coverage_at_risk(*in_order([1] + [0] * 99)).item() == 1.0
    assert coverage_at_risk(*in_order([1] + [0] * 9)).item() == 0.0


def test_limits():
    for number in (1, 2, 7):
        right, wrong = in_order([0] * number), in_order([1] * number)
        assert area_under_risk_coverage(*right) == 0
        assert excess_area_under_risk_coverage(*right) == 0
        assert area_under_generalised_risk_coverage(*right) == 0
        assert coverage_at_risk(*right, risk=0.0) == 1
        assert area_under_risk_coverage(*wrong).item() == pytest.approx(1)
        assert excess_area_under_risk_coverage(*wrong).item() == pytest.approx(0, abs=1e-15)
        assert area_under_generalised_risk_coverage(*wrong) == 0.5
        assert coverage_at_risk(*wrong, risk=0.99) == 0
    tied = in_order([0, 1, 0, 0], [0.8] * 4)
    assert area_under_risk_coverage(*tied).item() == pytest.approx(0.25)
    assert area_under_generalised_risk_coverage(*tied).item() == pytest.approx(0.125)


def test_confidences_that_round_to_one_are_told_apart():
    log_probs = torch.tensor([[-1e-20, -46.0], [-1e-25, -57.0]], dtype=torch.float64)
    assert log_probs.exp()[:, 0].tolist() == [1.0, 1.0]
    assert area_under_risk_coverage(log_probs, torch.tensor([1, 0])).item() == 0.25


@pytest.mark.parametrize("risk", [-0.1, 1.1, math.nan])
def test_refuses_a_risk_out_of_range(risk):
    with pytest.raises(ValueError, match="risk"):
        coverage_at_risk(*predictions(), risk=risk)
