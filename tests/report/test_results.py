import dataclasses
import statistics

import pytest
import torch

from bmoe_lightning.metrics import (
    METRIC_NAMES,
    brier_score,
    calibration_resamples,
    calibration_values,
    centred_interval,
    expected_calibration_error,
)
from bmoe_lightning.report.results import SummarySettings, by_method, summarise

SETTINGS = SummarySettings(num_samples=200)


def test_one_row_a_method_in_order_of_appearance(results):
    rows = summarise(list(reversed(results)), SETTINGS)
    assert [row.method for row in rows] == ["laplace_evidence", "temperature", "map"]
    assert all(row.seeds == (0, 1) and row.num_examples == 60 for row in rows)
    assert rows[2].label == "MAP"


def test_mean_and_deviation_over_seeds(results):
    row = summarise(results, SETTINGS)[0]
    own = [result for result in results if result.method == "map"]
    briers = [brier_score(result.log_probs, result.target).item() for result in own]
    assert briers[0] != briers[1]
    assert row.metrics["brier"].mean == pytest.approx(statistics.mean(briers))
    assert row.metrics["brier"].std == pytest.approx(statistics.stdev(briers))


def test_interval_is_of_the_seed_mean_over_the_same_resamples(results):
    row = summarise(results, SETTINGS)[0]
    own = [result for result in results if result.method == "map"]
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(60, (200, 60), generator=generator)
    means = sorted(sum(brier_score(r.log_probs[i], r.target[i]).item() for r in own) / 2 for i in indices)
    # Percentiles 2.5 and 97.5 of 200 values, rounded outwards, shifted by the estimate less the median.
    shift = row.metrics["brier"].mean - float(torch.tensor(means).quantile(0.5, interpolation="nearest"))
    assert abs(shift) < 0.02
    assert row.metrics["brier"].low == pytest.approx(means[4] + shift)
    assert row.metrics["brier"].high == pytest.approx(means[195] + shift)


def test_a_single_seed_is_the_plain_bootstrap(one_seed):
    row = summarise(one_seed, SETTINGS)[1]
    predictions = one_seed[1].log_probs, one_seed[1].target
    values, resamples = calibration_values(*predictions), calibration_resamples(*predictions, num_samples=200)
    assert tuple(row.metrics) == METRIC_NAMES
    for name, metric in row.metrics.items():
        interval = centred_interval(resamples[name], values[name], lower=0.0)
        assert (metric.mean, metric.low, metric.high) == (values[name], interval.low, interval.high)
        assert metric.std is None


def test_settings_reach_the_metrics_and_are_told(one_seed):
    settings = SummarySettings(num_bins=5, convention="left", num_samples=100, level=0.9)
    row = summarise(one_seed, settings)[0]
    first = one_seed[0]
    ece = expected_calibration_error(first.log_probs, first.target, num_bins=5, convention="left")
    assert row.metrics["ece"].mean == ece.item()
    assert row.settings.ece_convention() == (
        "top-label confidence, 5 equal-width bins [lo, hi), weighted by the items in a bin"
    )
    assert row.settings.interval() == "90 % centred percentile bootstrap over test items, 100 resamples"


def test_extra_numbers_are_means_over_seeds(results):
    assert [row.extra for row in summarise(results, SETTINGS)] == [{}, {"temperature": 2.5}, {}]


def test_options_are_those_of_the_method(make_result):
    rows = summarise([make_result("map", seed, hyperparameters={"rank": 8}) for seed in (0, 1)], SETTINGS)
    assert rows[0].hyperparameters == {"rank": 8}


def test_methods_may_have_different_seeds(results):
    rows = summarise(results[:-1], SETTINGS)
    assert [row.seeds for row in rows] == [(0, 1), (0, 1), (0,)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": tuple(f"other-{i}" for i in range(60))}, r"map \(seed 1\) was not evaluated on the same items"),
        ({"ids": tuple(f"item-{i}" for i in reversed(range(60)))}, "same order"),
        ({"target": torch.zeros(60, dtype=torch.long)}, "same answers"),
        ({"label": "Maximum"}, "several labels"),
        ({"seed": 0}, "more than one result for a seed"),
        ({"hyperparameters": {"rank": 4}}, "map has other options for some seeds"),
    ],
)
def test_what_cannot_be_compared_is_refused(make_result, changes, message):
    with pytest.raises(ValueError, match=message):
        summarise([make_result("map", 0), dataclasses.replace(make_result("map", 1), **changes)], SETTINGS)


def test_no_results():
    with pytest.raises(ValueError, match="no results"):
        by_method([])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "Deep ensemble"}, ValueError, "slug"),
        ({"method": "../map"}, ValueError, "slug"),
        ({"log_probs": torch.zeros(60, 4)}, ValueError, r"map \(seed 0\).*log_softmax"),
        ({"target": torch.zeros(60)}, TypeError, r"map \(seed 0\).*class indices"),
        ({"ids": ("a",) * 60}, ValueError, "60 ids, 1 of them different"),
        ({"ids": ("a", "b")}, ValueError, "60 predictions, but 2 ids"),
    ],
)
def test_result_refuses(make_result, changes, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(make_result("map", 0), **changes)


def test_further_metrics_have_the_values_of_their_functions_and_intervals(results):
    from bmoe_lightning.metrics import METRICS

    further = tuple(metric.name for metric in METRICS[len(METRIC_NAMES) :])
    row = summarise(results, SummarySettings(num_samples=20, further=further))[0]
    assert tuple(row.metrics) == (*METRIC_NAMES, *further)
    own = [result for result in results if result.method == "map"]
    for metric in METRICS:
        values = [float(metric.value(r.log_probs, r.target, row.settings.binning)) for r in own]
        assert row.metrics[metric.name].mean == pytest.approx(statistics.mean(values), abs=1e-9)
        assert row.metrics[metric.name].low <= row.metrics[metric.name].mean <= row.metrics[metric.name].high


@pytest.mark.parametrize(
    ("further", "message"), [(("wer",), "no metric 'wer'"), (("nll",), "repeat"), (("aurc", "aurc"), "repeat")]
)
def test_further_metrics_are_checked(further, message):
    with pytest.raises(ValueError, match=message):
        SummarySettings(further=further)


def test_scores_of_uncertainty_are_one_for_each_item(make_result):
    scores = torch.zeros(60)
    assert make_result("map", 0, uncertainty={"mutual_information": scores}).uncertainty["mutual_information"] is scores
    with pytest.raises(ValueError, match=r"has 60 predictions, but scores of spread in other shapes"):
        make_result("map", 0, uncertainty={"mutual_information": scores, "spread": scores[:5]})
