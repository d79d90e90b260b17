import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_roc

from bmoe_lightning.metrics import METRICS, detection_metrics, detection_values, unit_ranks
from bmoe_lightning.metrics.binning import Binning
from bmoe_lightning.metrics.detection import DETECTION_NAMES, weighted_detection


def scores(number=80, seed=0, ties=True):
    generator = torch.Generator().manual_seed(seed)
    positive = torch.rand(number, generator=generator) < 0.3
    score = torch.randn(number, generator=generator, dtype=torch.float64) + positive
    return (4 * score).round() / 4 if ties else score, positive


def by_hand(score, positive):
    """Pairs, thresholds and recall, in plain Python."""
    inside, outside = score[~positive].tolist(), score[positive].tolist()
    auroc = sum((o > i) + (o == i) / 2 for o in outside for i in inside) / (len(inside) * len(outside))
    aupr, fpr95, before = 0.0, 1.0, 0
    for threshold in sorted(set(score.tolist()), reverse=True):
        true, false = sum(o >= threshold for o in outside), sum(i >= threshold for i in inside)
        aupr += (true - before) / len(outside) * true / (true + false)
        before = true
        if true >= 0.95 * len(outside):
            fpr95 = min(fpr95, false / len(inside))
    return {"auroc": auroc, "aupr": aupr, "fpr95": fpr95}


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_torchmetrics_and_resamples_against_a_loop(seed, ties):
    score, positive = scores(seed=seed, ties=ties)
    expected = by_hand(score, positive)
    assert detection_values(score, positive) == pytest.approx(expected, abs=1e-6)
    drawn = torch.randint(80, (5, 80), generator=torch.Generator().manual_seed(1))
    counts = torch.stack([torch.bincount(row, minlength=80) for row in drawn]).double()
    for name, function in weighted_detection(score, positive).items():
        assert function(torch.ones(1, 80).double()).item() == pytest.approx(expected[name], abs=1e-12)
        for s, row in enumerate(drawn):
            assert function(counts)[s].item() == pytest.approx(by_hand(score[row], positive[row])[name], abs=1e-12)


def test_large_scores_are_not_tied_by_a_sigmoid():
    score, positive = torch.tensor([100.0, 200.0, 300.0, 400.0]), torch.tensor([False, False, True, True])
    assert binary_auroc(score, positive.long()) == 0.5
    assert detection_values(score, positive)["auroc"] == 1.0
    assert unit_ranks(score).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert unit_ranks(torch.ones(3)).tolist() == [0, 0, 0]


def test_the_direction_is_fixed():
    score, positive = scores(ties=False)
    forward, backward = detection_values(score, positive), detection_values(-score, positive)
    assert forward["auroc"] > 0.6
    assert backward["auroc"] == pytest.approx(1 - forward["auroc"], abs=1e-6)
    assert detection_values(score, ~positive)["auroc"] < 0.4


def test_one_class_has_no_value():
    score = torch.rand(5)
    for positive in (torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)):
        assert all(value != value for value in detection_values(score, positive).values())
        for function in weighted_detection(score, positive).values():
            assert bool(function(torch.ones(1, 5).double()).isnan().all())


def test_the_collection_has_torchmetrics_values():
    score, positive = scores()
    collection = detection_metrics()
    assert set(collection.keys()) == set(DETECTION_NAMES)
    collection.update(unit_ranks(score), positive.long())
    found = collection.compute()
    ranks, truth = unit_ranks(score), positive.long()
    assert found["auroc"] == binary_auroc(ranks, truth)
    assert found["aupr"] == binary_average_precision(ranks, truth)
    fpr, tpr, _ = binary_roc(ranks, truth)
    assert found["fpr95"].item() == pytest.approx(fpr[tpr >= 0.95].min().item(), abs=1e-6)


def test_errors_are_detected_by_the_top_confidence(predictions):
    log_probs, target = predictions(80)
    top, predicted = log_probs.exp().max(1)
    expected = by_hand(1 - top, predicted != target)
    for metric in METRICS:
        if metric.name.startswith("error_"):
            found = float(metric.value(log_probs, target, Binning()))
            assert found == pytest.approx(expected[metric.name.removeprefix("error_")], abs=1e-6)


@pytest.mark.parametrize(
    ("score", "positive", "message"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([True, False]), "1 of 2 scores are NaN"),
        (torch.ones(3), torch.ones(2).bool(), "expected scores"),
        (torch.ones(0), torch.ones(0).bool(), "expected scores"),
    ],
)
def test_refusals(score, positive, message):
    with pytest.raises(ValueError, match=message):
        detection_values(score, positive)
