import math
import time

import pytest
import torch

from bmoe_lightning.metrics import bootstrap as B
from bmoe_lightning.metrics import functional as F

FUNCTIONS = {
    "acc": F.accuracy,
    "ece": F.expected_calibration_error,
    "nll": F.negative_log_likelihood,
    "brier": F.brier_score,
}


def predictions(number=200, seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(number, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial((logits / 2).softmax(1), 1, generator=generator).squeeze(1)
    return logits.log_softmax(1), target


def test_values_are_those_of_the_functions():
    log_probs, target = predictions()
    values = B.calibration_values(log_probs, target)
    assert list(values) == list(B.METRIC_NAMES)
    for name, function in FUNCTIONS.items():
        assert values[name] == pytest.approx(function(log_probs, target).item(), abs=1e-12)


@pytest.mark.parametrize("convention", ["right", "left"])
def test_resamples_equal_a_loop_over_resamples(convention, monkeypatch):
    log_probs, target = predictions(60)
    resamples = B.calibration_resamples(log_probs, target, num_samples=40, seed=3, num_bins=7, convention=convention)
    rows = torch.cat(list(B._resamples(60, 40, 3)))
    for s, row in enumerate(rows):
        expected = B.calibration_values(log_probs[row], target[row], num_bins=7, convention=convention)
        for name in B.METRIC_NAMES:
            assert resamples[name][s].item() == pytest.approx(expected[name], abs=1e-12)
    monkeypatch.setattr(B, "_DRAWS_PER_CHUNK", 60 * 7)
    in_chunks = torch.cat(list(B._resamples(60, 40, 3)))
    assert in_chunks.shape == rows.shape


@pytest.mark.parametrize("name", B.METRIC_NAMES)
def test_named_and_function_statistics_agree(name):
    log_probs, target = predictions(50)
    settings = {"num_samples": 60, "level": 0.9, "seed": 1}
    named = B.bootstrap_interval(name, log_probs, target, **settings)
    called = B.bootstrap_interval(FUNCTIONS[name], log_probs, target, **settings)
    assert (named.low, named.high) == pytest.approx((called.low, called.high), abs=1e-12)
    assert named.low < named.high


def test_interval_of_a_proportion_has_the_binomial_width():
    n, p = 400, 0.8
    log_probs = torch.tensor([[0.9, 0.1]]).log().repeat(n, 1)
    target = (torch.arange(n) >= n * p).long()
    interval = B.bootstrap_interval("acc", log_probs, target, num_samples=4000)
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert interval.low == pytest.approx(p - half, abs=0.006)
    assert interval.high == pytest.approx(p + half, abs=0.006)


def test_seeded_and_the_global_generator_is_left_alone():
    log_probs, target = predictions(50)
    before = torch.get_rng_state()
    first = B.bootstrap_interval("nll", log_probs, target, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert B.bootstrap_interval("nll", log_probs, target, seed=1) == first
    assert B.bootstrap_interval("nll", log_probs, target, seed=2) != first


def test_higher_level_is_wider_and_percentiles_are_right():
    samples = torch.arange(1, 103, dtype=torch.float64)
    assert B.percentile_interval(samples, 0.9) == B.Interval(6.0, 97.0)
    assert B.percentile_interval(samples, 0.5) == B.Interval(26.0, 77.0)


def test_infinite_losses_give_infinite_ends_and_no_nan():
    log_probs, target = predictions(50)
    log_probs[0] = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf])
    target[0] = 1
    with pytest.warns(UserWarning, match="infinite"):
        resamples = B.calibration_resamples(log_probs, target, num_samples=200)
    assert not torch.isnan(resamples["nll"]).any()
    assert torch.isfinite(resamples["nll"]).any()  # some resamples do not draw the example
    assert B.percentile_interval(resamples["nll"]).high == math.inf
    assert math.isfinite(B.percentile_interval(resamples["nll"]).low)


def test_summary():
    log_probs, target = predictions(100)
    summary = B.calibration_summary(log_probs, target, num_samples=300, seed=5)
    assert list(summary) == ["acc", "ece", "nll", "brier"]
    for name, estimate in summary.items():
        interval = B.bootstrap_interval(name, log_probs, target, num_samples=300, seed=5)
        assert estimate == B.Estimate(FUNCTIONS[name](log_probs, target).item(), interval.low, interval.high)
    assert summary["nll"].low < summary["nll"].value < summary["nll"].high


def test_one_thousand_resamples_of_five_hundred_examples_are_quick():
    log_probs, target = predictions(500)
    start = time.process_time()
    B.calibration_summary(log_probs, target)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lp, y: B.bootstrap_interval("f1", lp, y), "'f1'"),
        (lambda lp, y: B.bootstrap_interval("acc", lp, y, level=1.0), "level"),
        (lambda lp, y: B.bootstrap_interval("acc", lp, y, num_samples=0), "num_samples"),
        (lambda lp, y: B.bootstrap_interval(F.accuracy, lp.exp(), y), "log_softmax"),
        (lambda lp, y: B.calibration_summary(lp, y, num_bins=0), "num_bins"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(*predictions(5))
