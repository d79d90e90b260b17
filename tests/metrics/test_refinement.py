import math

import numpy as np
import pytest
import torch

from bmoe_lightning.metrics import (
    NLLCalibration,
    NLLRefinement,
    negative_log_likelihood,
    negative_log_likelihood_split,
)
from bmoe_lightning.metrics.bootstrap import draw_resamples
from bmoe_lightning.metrics.refinement import _split


def losses(log_probs, target, inverse):
    scaled = inverse * log_probs
    largest = scaled.max(1, keepdims=True)
    norm = largest[:, 0] + np.log(np.exp(scaled - largest).sum(1))
    return norm - scaled[np.arange(len(target)), target]


def best_inverse(log_probs, target, weights):
    """Ternary search of the penalised loss, which is convex in the inverse temperature, in its logarithm."""

    def objective(place):
        inverse = math.exp(place)
        return (weights * losses(log_probs, target, inverse)).sum() + (inverse - 1) ** 2 / 2

    found = ternary_minimum(objective, math.log(0.01), math.log(100.0))
    return math.exp(found)


def ternary_minimum(objective, low, high):
    for _ in range(60):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, second) if objective(first) < objective(second) else (first, high)
    return (low + high) / 2


def brute_force(log_probs, target, counts=None):
    """Refinement with a search of its own for every example that is left out."""
    p, y = log_probs.numpy(), target.numpy()
    counts = np.ones(len(y)) if counts is None else counts
    total = 0.0
    for n in np.flatnonzero(counts):
        rest = np.where(np.arange(len(y)) == n, 0, counts)
        total += counts[n] * losses(p[n : n + 1], y[n : n + 1], best_inverse(p, y, rest))[0]
    return total / counts.sum()


def answers(number, wrong, gap):
    """Two classes whose logits differ by `gap`, of which the label has the smaller one in `wrong` examples."""
    logits = torch.zeros(number, 2, dtype=torch.float64)
    logits[:, 0] = gap
    target = torch.zeros(number, dtype=torch.int64)
    target[:wrong] = 1
    return logits.log_softmax(1), target


@pytest.mark.parametrize(("classes", "scale"), [(4, 1.0), (2, 3.0), (4, 0.2), (4, 30.0)])
def test_against_brute_force(classes, scale, predictions):
    log_probs, target = predictions(61, classes)
    log_probs = (scale * log_probs).log_softmax(1)
    found = negative_log_likelihood_split(log_probs, target)
    assert found.refinement.item() == pytest.approx(brute_force(log_probs, target), abs=1e-6)
    total = negative_log_likelihood(log_probs, target)
    assert (found.calibration + found.refinement).item() == pytest.approx(total.item(), abs=1e-12)


@pytest.mark.parametrize(
    ("number", "wrong", "gap"),
    [(200, 1, 20.0), (500, 1, 15.0), (50, 1, 8.0), (200, 3, 20.0), (100, 2, 12.0), (30, 0, 5.0), (1, 1, 9.0)],
)
def test_few_errors_against_brute_force(number, wrong, gap):
    """The temperature moves far where the one error is left out."""
    log_probs, target = answers(number, wrong, gap)
    found = negative_log_likelihood_split(log_probs, target)
    p, y = log_probs.numpy(), target.numpy()
    expected = 0.0
    # All right answers are alike, as are all wrong ones.
    for n in {0, number - 1} if 0 < wrong < number else {0}:
        inverse = best_inverse(p, y, np.arange(number) != n)
        expected += float((y == y[n]).sum()) * losses(p[n : n + 1], y[n : n + 1], inverse)[0] / number
    assert found.refinement.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_few_errors_of_varied_confidence_against_brute_force(wrong, predictions):
    log_probs, _ = predictions(80)
    log_probs = (4 * log_probs).log_softmax(1)
    target = log_probs.argmax(1)
    target[:wrong] = log_probs[:wrong].argmin(1)
    found = negative_log_likelihood_split(log_probs, target)
    assert found.refinement.item() == pytest.approx(brute_force(log_probs, target), abs=1e-6)


def test_a_temperature_changes_the_calibration_and_hardly_the_refinement(predictions):
    log_probs, target = predictions(500)
    splits = [negative_log_likelihood_split((b * log_probs).log_softmax(1), target) for b in (0.5, 1.0, 2.0)]
    # Logits are twice those that the labels were drawn from.
    assert abs(splits[0].calibration) < 0.01
    assert splits[1].calibration > 0.05
    assert splits[2].calibration > splits[1].calibration + 0.3
    values = [split.refinement.item() for split in splits]
    assert max(values) - min(values) < 1e-3


def test_copies_of_an_example_are_left_out_together(predictions):
    log_probs, target = predictions(40)
    [drawn] = draw_resamples(40, 6, 0)
    found = _split(log_probs, target, drawn.counts).refinement
    for value, counts in zip(found, drawn.counts.numpy(), strict=True):
        assert value.item() == pytest.approx(brute_force(log_probs, target, counts), abs=1e-6)


def test_limits(predictions):
    log_probs, target = predictions(30)
    uniform = torch.full((30, 4), -math.log(4), dtype=torch.float64)
    assert negative_log_likelihood_split(uniform, target).calibration.item() == pytest.approx(0, abs=1e-12)
    one = negative_log_likelihood_split(log_probs[:1], target[:1])
    assert one.calibration.item() == pytest.approx(0, abs=1e-12)
    assert one.refinement.item() == pytest.approx(-log_probs[0, target[0]].item())
    right = negative_log_likelihood_split(log_probs, log_probs.argmax(1))
    assert 0 < right.refinement < negative_log_likelihood(log_probs, log_probs.argmax(1))
    wrong = negative_log_likelihood_split(log_probs, log_probs.argmin(1))
    assert wrong.refinement.item() == pytest.approx(math.log(4), abs=0.1)


def test_one_error_among_right_answers_keeps_the_refinement_small(predictions):
    """The folds without the error are all right, where the likelihood alone has no largest 1/T."""
    log_probs, _ = predictions(60)
    target = log_probs.argmax(1)
    target[0] = log_probs[0].argmin()
    found = negative_log_likelihood_split(log_probs, target)
    assert found.refinement < 2 * negative_log_likelihood(log_probs, target)


def test_a_label_of_probability_zero_is_refinement(predictions):
    log_probs, target = predictions(30)
    impossible = log_probs.clone()
    impossible[0, target[0]] = -torch.inf
    impossible = impossible.log_softmax(1)
    found = negative_log_likelihood_split(impossible, target)
    assert found.refinement == math.inf
    assert math.isfinite(found.calibration)


def test_the_classes_have_the_parts(predictions):
    log_probs, target = predictions(30)
    expected = negative_log_likelihood_split(log_probs, target)
    for twin, part in ((NLLCalibration(), expected.calibration), (NLLRefinement(), expected.refinement)):
        twin.update(log_probs, target)
        torch.testing.assert_close(twin.compute(), part, rtol=0, atol=1e-12)
