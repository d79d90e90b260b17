"""How often intervals contain what they are about, and how the choice between bootstrap intervals was made.

`python tests/metrics/test_interval_coverage.py` prints the comparison as the table of the documentation.
"""

import math

import pytest
import torch
from torch.distributions import Normal

from bmoe_lightning.metrics import METRICS, MetricSpec, centred_interval
from bmoe_lightning.metrics.binning import Binning
from bmoe_lightning.metrics.bootstrap import draw_resamples

BINNING = Binning()
ECE = next(metric for metric in METRICS if metric.name == "ece")


def population(number, temperature, generator):
    """Four classes; temperature 1 is calibrated, a larger one overconfident."""
    logits = 2 * torch.randn(number, 4, generator=generator, dtype=torch.float64)
    target = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator).squeeze(1)
    return logits.log_softmax(1), target


def expectation(metric: MetricSpec, number, temperature, repetitions):
    """Mean of the metric over data sets of one size."""
    generator = torch.Generator().manual_seed(11)
    values = [float(metric.value(*population(number, temperature, generator), BINNING)) for _ in range(repetitions)]
    return sum(values) / repetitions


def percentiles(samples, estimate):
    return float(samples.quantile(0.025)), float(samples.quantile(0.975))


def reflected(samples, estimate):
    low, high = percentiles(samples, estimate)
    return max(2 * estimate - high, 0.0), 2 * estimate - low


def bias_corrected(samples, estimate):
    """Efron 1987 without acceleration."""
    normal, number = Normal(0.0, 1.0), len(samples)
    below = (samples < estimate).double().mean() + (samples == estimate).double().mean() / 2
    shift = normal.icdf(below.clamp(0.5 / number, 1 - 0.5 / number))
    ends = normal.cdf(2 * shift + normal.icdf(torch.tensor([0.025, 0.975], dtype=torch.float64)))
    return tuple(samples.quantile(ends).tolist())


def centred(samples, estimate):
    found = centred_interval(samples, estimate, lower=0.0)
    return found.low, found.high


WAYS = {
    "percentiles": percentiles,
    "reflected percentiles": reflected,
    "bias-corrected percentiles": bias_corrected,
    "centred percentiles": centred,
}


def coverage(metric, number, temperature, ways=WAYS, repetitions=150, num_samples=300, expected_from=600):
    """For each way: how often its interval contains the expectation of the metric, and its own estimate."""
    truth = expectation(metric, number, temperature, expected_from)
    generator = torch.Generator().manual_seed(7)
    hits, contains = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    for seed in range(repetitions):
        log_probs, target = population(number, temperature, generator)
        estimate = float(metric.value(log_probs, target, BINNING))
        resampled = metric.resampled(log_probs, target, BINNING)
        samples = torch.cat([resampled(drawn) for drawn in draw_resamples(number, num_samples, seed)])
        for name, way in ways.items():
            low, high = way(samples, estimate)
            hits[name] += low <= truth <= high
            contains[name] += low <= estimate <= high
    return {name: (hits[name] / repetitions, contains[name] / repetitions) for name in ways}


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_intervals_cover_the_expectation_of_the_metric(metric):
    def of_metric(samples, estimate):
        found = centred_interval(samples, estimate, lower=metric.lower, upper=metric.upper)
        return found.low, found.high

    # Four standard errors below .95 at this number of repetitions.
    repetitions = 60
    least = 0.95 - 4 * math.sqrt(0.95 * 0.05 / repetitions)
    ways = {"centred": of_metric}
    hits, contains = coverage(metric, 120, 2.0, ways, repetitions, num_samples=80, expected_from=200)["centred"]
    assert hits >= least
    assert contains == 1.0


@pytest.mark.slow
def test_no_other_way_covers_the_ece_better():
    for temperature in (1.0, 1.5):
        found = coverage(ECE, 337, temperature)
        assert found["centred percentiles"][1] == 1.0
        assert found["centred percentiles"][0] >= max(hits for hits, _ in found.values()) - 0.02
    assert coverage(ECE, 337, 1.0)["percentiles"][1] < 0.95


if __name__ == "__main__":
    print("| interval | contains the mean ECE, calibrated | overconfident | contains its value, calibrated |")
    print("| --- | ---: | ---: | ---: |")
    calibrated, overconfident = (coverage(ECE, 337, temperature) for temperature in (1.0, 1.5))
    for name in WAYS:
        print(f"| {name} | {calibrated[name][0]:.2f} | {overconfident[name][0]:.2f} | {calibrated[name][1]:.2f} |")
