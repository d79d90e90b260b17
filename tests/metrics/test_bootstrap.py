import math
import time

import pytest
import torch

from bmoe_lightning.metrics import METRIC_NAMES, METRICS, calibration_values
from bmoe_lightning.metrics import bootstrap as B
from bmoe_lightning.metrics.binning import Binning


@pytest.mark.parametrize("convention", ["right", "left"])
def test_resamples_equal_a_loop_over_resamples(convention, predictions):
    log_probs, target = predictions(60)
    resamples = B.calibration_resamples(log_probs, target, num_samples=40, seed=3, num_bins=7, convention=convention)
    assert tuple(resamples) == METRIC_NAMES
    rows = torch.cat([drawn.indices for drawn in B.draw_resamples(60, 40, 3)])
    for s, row in enumerate(rows):
        expected = calibration_values(log_probs[row], target[row], num_bins=7, convention=convention)
        for name in METRIC_NAMES:
            assert resamples[name][s].item() == pytest.approx(expected[name], abs=1e-12)


@pytest.mark.parametrize(("draws", "sizes"), [(60 * 7, [7] * 5 + [5]), (10, [1] * 40), (10**6, [40])])
def test_chunks_bound_the_draws(draws, sizes):
    chunks = [drawn.indices for drawn in B.draw_resamples(60, 40, 3, draws_per_chunk=draws)]
    assert [len(chunk) for chunk in chunks] == sizes
    assert all(chunk.shape[1] == 60 for chunk in chunks)
    assert 0 <= min(int(chunk.min()) for chunk in chunks) < max(int(chunk.max()) for chunk in chunks) < 60


def interval(name, predictions, **settings):
    return B.centred_interval(
        B.calibration_resamples(*predictions, **settings)[name], calibration_values(*predictions)[name]
    )


def test_interval_of_a_proportion_has_the_binomial_width():
    n, p = 400, 0.8
    log_probs = torch.tensor([[0.9, 0.1]]).log().repeat(n, 1)
    target = (torch.arange(n) >= n * p).long()
    found = interval("acc", (log_probs, target), num_samples=4000)
    half = 1.96 * math.sqrt(p * (1 - p) / n)
    assert found.low == pytest.approx(p - half, abs=0.006)
    assert found.high == pytest.approx(p + half, abs=0.006)


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_seeded_and_the_global_generator_is_left_alone(name, predictions):
    data = predictions(50)
    before = torch.get_rng_state()
    first = interval(name, data, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert interval(name, data, seed=1) == first
    assert interval(name, data, seed=2) != first
    assert first.low < first.high


def test_methods_on_one_test_set_are_paired(predictions):
    log_probs, target = predictions(50)
    sharper = (1.5 * log_probs).log_softmax(1)
    first, second = (B.calibration_resamples(lp, target)["acc"] for lp in (log_probs, sharper))
    assert torch.equal(first, second)


def test_higher_level_is_wider_and_percentiles_are_right():
    samples = torch.arange(1, 103, dtype=torch.float64)
    median = float(samples.quantile(0.5, interpolation="nearest"))
    assert B.centred_interval(samples, median, 0.9) == B.Interval(6.0, 97.0)
    assert B.centred_interval(samples, median, 0.5) == B.Interval(26.0, 77.0)


def test_the_interval_is_shifted_to_the_estimate_and_clipped():
    samples = torch.arange(1, 102, dtype=torch.float64)
    assert B.centred_interval(samples, 11.0, 0.5) == B.Interval(-14.0, 36.0)
    assert B.centred_interval(samples, 11.0, 0.5, lower=0.0, upper=30.0) == B.Interval(0.0, 30.0)
    assert B.centred_interval(samples + 100, 0.0, 0.5, lower=0.0) == B.Interval(0.0, 25.0)
    assert B.centred_interval(samples, 1 + 1e-15, 0.5, lower=0.0, upper=1.0).high == 1 + 1e-15


def test_undefined_resamples_are_left_out_and_an_undefined_estimate_has_no_interval():
    samples = torch.tensor([1.0, torch.nan, 3.0, 2.0, torch.nan])
    assert B.centred_interval(samples, 2.0) == B.Interval(1.0, 3.0)
    for values, estimate in ((samples, math.nan), (samples[[1, 4]], 2.0)):
        found = B.centred_interval(values, estimate)
        assert math.isnan(found.low)
        assert math.isnan(found.high)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_the_interval_contains_the_estimate_and_lies_in_the_range(metric, predictions):
    """On small data sets, calibrated ones among them, where plain percentiles of an ECE lie above it."""
    outside = defined = 0
    for seed in range(24):
        log_probs, target = predictions(3 + 7 * (seed % 8), classes=2 + seed % 3, seed=seed)
        if seed % 2:
            log_probs = (log_probs / 2).log_softmax(1)
        estimate = float(metric.value(log_probs, target, Binning()))
        resampled = metric.resampled(log_probs, target, Binning())
        samples = torch.cat([resampled(drawn) for drawn in B.draw_resamples(len(target), 60, seed)])
        found = B.centred_interval(samples, estimate, lower=metric.lower, upper=metric.upper)
        if math.isnan(estimate):
            assert math.isnan(found.low)
            continue
        defined += 1
        assert metric.lower <= found.low <= estimate <= found.high <= metric.upper
        outside += not float(samples.nanquantile(0.025)) <= estimate <= float(samples.nanquantile(0.975))
    assert defined > 12
    if metric.name == "ece":
        assert outside > 0


def test_infinite_losses_give_infinite_ends_and_no_nan(predictions):
    log_probs, target = predictions(50)
    log_probs[0] = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf])
    target[0] = 1
    with pytest.warns(UserWarning, match="infinite"):
        resamples = B.calibration_resamples(log_probs, target, num_samples=200)
    assert not torch.isnan(resamples["nll"]).any()
    assert torch.isfinite(resamples["nll"]).any()  # some resamples do not draw the example
    found = B.centred_interval(resamples["nll"], math.inf)
    assert found.high == math.inf
    assert math.isfinite(found.low)


def test_one_thousand_resamples_of_five_hundred_examples_are_quick(predictions):
    log_probs, target = predictions(500)
    start = time.process_time()
    B.calibration_resamples(log_probs, target)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lp, y: B.centred_interval(lp[:, 0], 0.0, level=1.0), "level"),
        (lambda lp, y: B.calibration_resamples(lp, y, num_samples=0), "num_samples"),
        (lambda lp, y: B.calibration_resamples(lp.exp(), y), "log_softmax"),
        (lambda lp, y: B.calibration_resamples(lp, y, num_bins=0), "num_bins"),
    ],
)
def test_refusals(call, message, predictions):
    with pytest.raises(ValueError, match=message):
        call(*predictions(5))
