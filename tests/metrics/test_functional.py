import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from bmoe_lightning.metrics import functional as F

METRICS = [
    F.accuracy,
    F.negative_log_likelihood,
    F.brier_score,
    F.expected_calibration_error,
    F.reliability_curve,
    F.misclassification_auroc,
]


def predictions(number=300, classes=4, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(number, classes, generator=generator, dtype=torch.float64)
    target = torch.distributions.Categorical(logits=logits / 2).sample()
    return logits.log_softmax(1).to(dtype), target


def binary(confidences, right):
    """Two-class log-probs whose top label is class 0 with the given confidence."""
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1).log(), torch.tensor([0 if r else 1 for r in right])


def loop_reference(log_probs, target, num_bins, closed_right):
    bins = {}
    for row, y in zip(log_probs.exp().tolist(), target.tolist(), strict=True):
        confidence = max(row)
        for b in range(num_bins):
            lo, hi = b / num_bins, (b + 1) / num_bins
            inside = lo < confidence <= hi if closed_right else lo <= confidence < hi
            if inside or (not closed_right and b == num_bins - 1 and confidence == 1.0):
                bins.setdefault(b, []).append((confidence, row.index(confidence) == y))
    total = len(target)
    return sum(abs(sum(c for c, _ in v) - sum(r for _, r in v)) for v in bins.values()) / total


def test_plain_metrics_against_a_loop():
    log_probs, target = predictions()
    rows = list(zip(log_probs.tolist(), target.tolist(), strict=True))
    right = [max(range(4), key=row.__getitem__) == y for row, y in rows]
    assert F.accuracy(log_probs, target).item() == pytest.approx(sum(right) / len(right), abs=1e-12)
    nll = -sum(row[y] for row, y in rows) / len(rows)
    assert F.negative_log_likelihood(log_probs, target).item() == pytest.approx(nll, abs=1e-12)
    brier = sum(sum((math.exp(v) - (k == y)) ** 2 for k, v in enumerate(row)) for row, y in rows) / len(rows)
    assert F.brier_score(log_probs, target).item() == pytest.approx(brier, abs=1e-12)
    assert F.accuracy(log_probs.float(), target).dtype == torch.float64


@pytest.mark.parametrize("num_bins", [1, 4, 15, 40])
@pytest.mark.parametrize("convention", ["right", "left"])
def test_ece_against_a_loop(num_bins, convention):
    log_probs, target = predictions()
    expected = loop_reference(log_probs, target, num_bins, convention == "right")
    value = F.expected_calibration_error(log_probs, target, num_bins=num_bins, convention=convention)
    assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("num_bins", [10, 15])
@pytest.mark.parametrize("convention", ["right", "left"])
def test_ece_equals_torchmetrics_off_the_edges(norm, num_bins, convention):
    log_probs, target = predictions(500)
    theirs = multiclass_calibration_error(log_probs.exp(), target, num_classes=4, n_bins=num_bins, norm=norm)
    ours = F.expected_calibration_error(log_probs, target, num_bins=num_bins, convention=convention, norm=norm)
    # torchmetrics bins in float32.
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert ours > 0.01


def test_the_closed_side_of_a_bin():
    # With two bins, .5 is the inner edge: (0, .5] takes it to the first bin, [.5, 1) to the second.
    log_probs, target = binary([0.5, 0.75], [True, False])
    assert log_probs[0, 0].exp() == 0.5
    right = F.reliability_curve(log_probs, target, num_bins=2, convention="right")
    left = F.reliability_curve(log_probs, target, num_bins=2, convention="left")
    assert right.count.tolist() == [1, 1]
    assert left.count.tolist() == [0, 2]
    ece = F.expected_calibration_error(log_probs, target, num_bins=2)
    assert ece.item() == pytest.approx((0.5 + 0.75) / 2)
    assert F.expected_calibration_error(log_probs, target, num_bins=2, convention="left").item() == pytest.approx(0.125)


@pytest.mark.parametrize("convention", ["right", "left"])
def test_confidence_one_belongs_to_the_last_bin(convention):
    log_probs, target = binary([1.0, 0.95], [False, True])
    curve = F.reliability_curve(log_probs, target, convention=convention)
    assert curve.count.tolist() == [0.0] * 14 + [2.0]
    ece = F.expected_calibration_error(log_probs, target, convention=convention)
    assert ece.item() == pytest.approx(0.475)
    theirs = multiclass_calibration_error(log_probs.exp(), target, num_classes=2, n_bins=15)
    assert theirs.item() == pytest.approx(0.525)


def test_confidence_zero_belongs_to_the_first_bin():
    confidence = torch.tensor([0.0], dtype=torch.float64)
    assert F.bin_index(confidence, 15, "right").tolist() == [0]
    assert F.bin_index(confidence, 15, "left").tolist() == [0]


def test_a_probability_rounded_above_one_is_clamped_and_nothing_is_softmaxed_again():
    log_probs, target = predictions(50)
    log_probs[0] = torch.tensor([1e-7, -40.0, -40.0, -40.0])
    exact = log_probs.clone()
    exact[0, 0] = 0.0
    for metric in METRICS[:4]:
        assert metric(log_probs, target).item() == pytest.approx(metric(exact, target).item(), abs=1e-6)
    assert F.top_label(*F.check_predictions(log_probs, target))[0].max() == 1.0


def test_bfloat16_is_accepted_and_close():
    log_probs, target = predictions(400)
    half = log_probs.bfloat16()
    assert torch.logsumexp(half.double(), 1).abs().max() > F.NORMALISATION_TOLERANCE
    assert F.negative_log_likelihood(half, target).item() == pytest.approx(
        F.negative_log_likelihood(log_probs, target).item(), abs=2e-3
    )
    assert F.brier_score(half, target).item() == pytest.approx(F.brier_score(log_probs, target).item(), abs=5e-3)
    # The bin sums are not rounded to bfloat16: with 400 examples in one bin they would be.
    curve = F.reliability_curve(half, target, num_bins=1)
    assert curve.count.item() == 400
    assert curve.confidence.item() == pytest.approx(log_probs.max(1).values.exp().mean().item(), abs=2e-3)


def test_absent_classes_change_nothing():
    log_probs, target = predictions(100, classes=3)
    ragged = torch.cat([log_probs, torch.full((100, 2), -torch.inf, dtype=torch.float64)], 1)
    for metric in METRICS[:4] + METRICS[5:]:
        assert torch.equal(metric(ragged, target), metric(log_probs, target))


def test_zero_probability_of_the_target_is_infinite_and_said():
    log_probs = torch.tensor([[0.0, -torch.inf], [-0.6931471805599453, -0.6931471805599453]])
    target = torch.tensor([1, 0])
    with pytest.warns(UserWarning, match="1 of 2 examples"):
        assert F.negative_log_likelihood(log_probs, target) == torch.inf
    assert F.brier_score(log_probs, target).item() == pytest.approx((2 + 0.5) / 2)


def test_underflowed_probability_keeps_its_log():
    log_probs = torch.tensor([[-1e-30, -1000.0]], dtype=torch.float64)
    assert F.negative_log_likelihood(log_probs, torch.tensor([1])).item() == 1000.0


def test_curve():
    log_probs, target = binary([0.6, 0.62, 0.9], [True, False, True])
    curve = F.reliability_curve(log_probs, target, num_bins=5)
    torch.testing.assert_close(curve.bin_edges, torch.arange(6) / 5, check_dtype=False)
    assert curve.count.tolist() == [0, 0, 1, 1, 1]
    torch.testing.assert_close(curve.confidence[2:], torch.tensor([0.6, 0.62, 0.9]).double())
    assert curve.accuracy[2:].tolist() == [1, 0, 1]
    assert torch.isnan(curve.accuracy[:2]).all()
    assert torch.isnan(curve.confidence[:2]).all()


def test_auroc_against_all_pairs_with_ties():
    log_probs, target = predictions(120, classes=3)
    log_probs = (log_probs * 4).round() / 4  # makes ties
    log_probs = log_probs.log_softmax(1)
    log_probs = torch.cat([log_probs, log_probs])
    target = torch.cat([target, (target + 1) % 3])
    score, guess = log_probs.max(1)
    right, wrong = score[guess == target], score[guess != target]
    difference = right[:, None] - wrong[None, :]
    pairs = ((difference > 0).double() + 0.5 * (difference == 0).double()).mean()
    assert (difference == 0).any()
    assert F.misclassification_auroc(log_probs, target).item() == pytest.approx(pairs.item(), abs=1e-12)


def test_auroc_separates_and_keeps_confidences_next_to_one_apart():
    log_probs = torch.tensor([[-1e-20, -46.0], [-1e-18, -41.0], [-0.5, -0.9328]], dtype=torch.float64)
    assert F.misclassification_auroc(log_probs, torch.tensor([0, 1, 1])).item() == 1.0


@pytest.mark.parametrize("label", [0, 1])
def test_auroc_without_both_kinds_is_nan(label):
    log_probs, _ = binary([0.9, 0.8], [True, True])
    with pytest.warns(UserWarning, match="right and wrong"):
        assert torch.isnan(F.misclassification_auroc(log_probs, torch.full((2,), label)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("log_probs", "target", "error", "message"),
    [
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.long), ValueError, "apply log_softmax first"),
        (torch.full((4, 3), 1 / 3), torch.zeros(4, dtype=torch.long), ValueError, "apply log_softmax first"),
        (torch.full((4, 3), -torch.inf), torch.zeros(4, dtype=torch.long), ValueError, "apply log_softmax first"),
        (torch.full((4, 3), torch.inf), torch.zeros(4, dtype=torch.long), ValueError, "apply log_softmax first"),
        (torch.tensor([[math.nan, 0.0]]), torch.zeros(1, dtype=torch.long), ValueError, "NaN in 1 rows"),
        (torch.zeros(2, 1), torch.tensor([0, 1]), ValueError, r"\[0, 1\).*0 to 1"),
        (torch.zeros(2, 1), torch.tensor([-1, 0]), ValueError, "-1 to 0"),
        (torch.zeros(2, 1), torch.zeros(3, dtype=torch.long), ValueError, r"\[2, 1\] and \[3\]"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.long), ValueError, r"\[N, K\]"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), ValueError, "at least one example"),
        (torch.zeros(2, 1), torch.zeros(2), TypeError, "class indices"),
        (torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, dtype=torch.long), TypeError, "floating"),
    ],
)
def test_refusals(metric, log_probs, target, error, message):
    with pytest.raises(error, match=message):
        metric(log_probs, target)


@pytest.mark.parametrize("wrong", [{"num_bins": 0}, {"convention": "both"}, {"norm": "l3"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        F.expected_calibration_error(*predictions(5), **wrong)
