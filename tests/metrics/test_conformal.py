import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch

from bmoe_lightning.metrics import (
    PredictionSets,
    SetCoverage,
    SetSize,
    accuracy,
    conformal_threshold,
    cross_fitted_sets,
    get_metric,
    prediction_sets,
)
from bmoe_lightning.metrics.binning import Binning
from bmoe_lightning.metrics.bootstrap import draw_resamples
from bmoe_lightning.metrics.conformal import _of_labels, _scores, check_num_labels

SCORE = pytest.mark.parametrize("score", ["lac", "aps"])
BINNING = Binning()


def score_by_hand(row, k, score):
    """On the scale of the file, from one row of log-probabilities as a list."""
    if score == "lac":
        return -row[k]
    below = sum(math.exp(other) for other in row if other < row[k])
    return -math.log(below) if below else math.inf


def threshold_by_hand(log_probs, target, coverage, score):
    scores = sorted(score_by_hand(row, k, score) for row, k in zip(log_probs.tolist(), target.tolist(), strict=True))
    rank = math.ceil(round((len(scores) + 1) * coverage, 9))
    return scores[rank - 1] if rank <= len(scores) else math.inf


def set_by_hand(row, threshold, score):
    found = set()
    for k, value in enumerate(row):
        if value == max(row) or (value > -math.inf and score_by_hand(row, k, score) <= threshold + 1e-12):
            found.add(k)
    return found


def cross_fitted_by_hand(log_probs, target, folds, coverage, score):
    """Mean size and coverage, of rows that say which fold they are in."""
    size = covered = 0
    for row, k, fold in zip(log_probs.tolist(), target.tolist(), folds, strict=True):
        other = [n for n, each in enumerate(folds) if each != fold]
        found = set_by_hand(row, threshold_by_hand(log_probs[other], target[other], coverage, score), score)
        size += len(found)
        covered += k in found
    return size / len(folds), covered / len(folds)


def members(sets):
    return [set(row.nonzero().flatten().tolist()) for row in sets]


def ragged(predictions, number=40, seed=0):
    """Predictions with absent classes, ties within rows, and equal rows."""
    log_probs, target = predictions(number, 4, seed)
    log_probs[::3, 3] = -torch.inf
    log_probs[1::5, 0] = log_probs[1::5, 1]
    log_probs = log_probs.log_softmax(1)
    log_probs[number // 2 + 1 :] = log_probs[: number - number // 2 - 1].clone()
    return log_probs, torch.where(log_probs[:, 3].isinf(), target.clamp(max=2), target)


@SCORE
@pytest.mark.parametrize("coverage", [0.05, 0.5, 0.8, 0.9, 0.97])
@pytest.mark.parametrize("number", [1, 9, 40])
def test_thresholds_and_sets_against_a_loop(score, coverage, number, predictions):
    log_probs, target = ragged(predictions, number)
    found = conformal_threshold(log_probs, target, coverage=coverage, score=score)
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(threshold_by_hand(log_probs, target, coverage, score), abs=1e-9)
    new, _ = ragged(predictions, 30, seed=1)
    sets = prediction_sets(new, found, score=score)
    assert sets.shape == (30, 4)
    assert sets.dtype == torch.bool
    assert members(sets) == [set_by_hand(row, found.item(), score) for row in new.tolist()]


def test_scores_on_their_usual_scale():
    log_probs = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.3, 0.3, 0.4, 0.0]]).double().log()
    assert torch.exp(-_scores(log_probs, "lac")).tolist()[0] == pytest.approx([0.5, 0.3, 0.2, 0.0])
    mass = 1 - torch.exp(-_scores(log_probs, "aps"))
    # Classes that are equally probable have the mass of both.
    assert mass[0, :3].tolist() == pytest.approx([0.5, 0.8, 1.0])
    assert mass[1, :3].tolist() == pytest.approx([1.0, 1.0, 0.4])


@SCORE
@pytest.mark.parametrize(("number", "coverage"), [(9, 0.9), (19, 0.9), (24, 0.7), (30, 0.9)])
def test_labels_are_within_the_threshold_at_the_chosen_rate(score, number, coverage):
    """Many data sets of exchangeable examples: N labels for the threshold and one new one, both bounds."""
    draws, classes = 4000, 30
    generator = torch.Generator().manual_seed(number)
    # Labels are not drawn from the probabilities: the method is wrong, and the bounds hold all the same.
    logits = torch.randn(draws, number + 1, classes, generator=generator, dtype=torch.float64)
    target = torch.multinomial((0.7 * logits).softmax(2).flatten(0, 1), 1, generator=generator).view(draws, -1)
    log_probs = logits.log_softmax(2)
    assert (log_probs.argmax(2) == target).double().mean() < 0.3
    scores = _of_labels(_scores(log_probs.flatten(0, 1), score), target.flatten()).view(draws, -1)
    hits = 0
    for each, label, own in zip(log_probs, target, scores, strict=True):
        # Not by the sets, whose rule that none is empty may add the label.
        hits += int(own[-1] <= conformal_threshold(each[:-1], label[:-1], coverage=coverage, score=score))
    error = 4 * math.sqrt(coverage * (1 - coverage) / draws)
    assert coverage - error <= hits / draws <= coverage + 1 / (number + 1) + error


@SCORE
def test_sets_cover_new_examples(score, predictions):
    log_probs, target = predictions(4000)
    assert accuracy(log_probs, target) < 0.8
    sets = PredictionSets.fit(log_probs[:2000], target[:2000], coverage=0.8, score=score)
    assert dataclasses.astuple(sets)[:2] == (score, 0.8)
    assert sets.num_labels == 2000
    found = sets(log_probs[2000:])
    assert torch.equal(found, prediction_sets(log_probs[2000:], sets.threshold, score=score))
    covered = found[torch.arange(2000), target[2000:]].double().mean()
    assert covered >= 0.8 - 4 * math.sqrt(2 * 0.8 * 0.2 / 2000)
    assert found.any(1).all()


@SCORE
def test_too_few_labels_give_all_present_classes(score, predictions):
    log_probs, target = ragged(predictions, 9)
    assert math.isfinite(conformal_threshold(log_probs, target, coverage=0.9, score="lac"))
    for number in (1, 8):
        found = conformal_threshold(log_probs[:number], target[:number], coverage=0.9, score=score)
        assert found == math.inf
        assert torch.equal(prediction_sets(log_probs, found, score=score), log_probs > -torch.inf)
    one = cross_fitted_sets(log_probs[:1], target[:1], score=score)
    assert (one.size.item(), one.coverage.item()) == (3, 1)  # the other fold is empty, the fourth class is absent


@pytest.mark.parametrize("coverage", [0.05, 0.5, 0.6, 2 / 3, 0.75, 0.8, 0.9, 0.95])
def test_labels_are_refused_where_no_threshold_of_them_is_finite(coverage, predictions):
    log_probs, target = predictions(40)
    for number in range(1, 41):
        threshold = conformal_threshold(log_probs[:number], target[:number], coverage=coverage)
        with nullcontext() if threshold.isfinite() else pytest.raises(ValueError, match=f"{number} labels are too few"):
            check_num_labels(number, coverage)


@SCORE
def test_the_most_probable_classes_are_in_every_set(score):
    log_probs = torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.7, 0.2], [1 / 3, 1 / 3, 1 / 3]]).double().log()
    sets = prediction_sets(log_probs, -torch.inf, score=score)
    assert members(sets) == [{0, 1}, {1}, {0, 1, 2}]
    assert torch.equal(sets, prediction_sets(log_probs, torch.tensor(-5.0), score=score))


@SCORE
def test_a_label_of_probability_zero_is_in_no_set_and_counts_as_the_largest_score(score):
    log_probs = torch.tensor([[0.6, 0.4, 0.0]] * 20).double().log()
    target = torch.zeros(20, dtype=torch.int64)
    target[:3] = 2
    assert conformal_threshold(log_probs, target, coverage=0.9, score=score) == math.inf
    assert conformal_threshold(log_probs, target, coverage=0.8, score=score) < math.inf
    found = cross_fitted_sets(log_probs, target, coverage=0.9, score=score)
    assert found.coverage.item() == pytest.approx(17 / 20)
    assert found.size.item() == 2


@SCORE
def test_uniform_probabilities_give_all_classes(score):
    log_probs = torch.full((30, 4), -math.log(4), dtype=torch.float64)
    target = torch.arange(30) % 4
    assert prediction_sets(log_probs, conformal_threshold(log_probs, target, score=score), score=score).all()
    assert cross_fitted_sets(log_probs, target, score=score) == (4, 1)


@SCORE
def test_with_two_classes_a_temperature_changes_no_set(score, predictions):
    log_probs, target = predictions(60, classes=2)
    found = []
    for inverse in (0.2, 1.0, 5.0):
        scaled = (inverse * log_probs).log_softmax(1)
        sets = PredictionSets.fit(scaled[:30], target[:30], coverage=0.8, score=score)
        found.append(sets(scaled[30:]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    # The less probable of two classes has all the mass: with such labels at the threshold every set has both.
    assert 1 < found[0].double().sum(1).mean() < 2 if score == "lac" else bool(found[0].all())


@SCORE
def test_extreme_logits_keep_their_order(score):
    """Probabilities and masses of these would all be rounded to 0 or 1."""
    gaps = torch.linspace(100, 1400, 40, dtype=torch.float64)
    logits = torch.stack([gaps / 2, -gaps / 2, -gaps / 2 - 1], 1)
    wrong = torch.ones(40, dtype=torch.int64)
    log_probs = logits.log_softmax(1)
    found = conformal_threshold(log_probs, wrong, coverage=0.5, score=score)
    assert found.item() == pytest.approx(threshold_by_gap(gaps, score), rel=1e-12)
    sets = prediction_sets(log_probs, found, score=score)
    assert sets[:, 0].all()
    assert sets[:, 1].tolist() == [True] * 21 + [False] * 19


def threshold_by_gap(gaps, score):
    # The 21st of 40: -log p is the gap, and -log of the mass of the least probable class is one more.
    return gaps[20].item() + (score == "aps")


def test_an_aps_threshold_near_one_does_not_take_in_every_class():
    """A confident method, whose labels all have a mass that is rounded to 1."""
    logits = torch.tensor([[700.0, 0.0, -10.0, -700.0]], dtype=torch.float64).repeat(20, 1)
    log_probs = logits.log_softmax(1)
    target = torch.zeros(20, dtype=torch.int64)
    target[:6] = 1
    threshold = conformal_threshold(log_probs, target, coverage=0.9, score="aps")
    assert members(prediction_sets(log_probs, threshold, score="aps")) == [{0, 1}] * 20


@SCORE
@pytest.mark.parametrize("coverage", [0.5, 0.9])
@pytest.mark.parametrize("number", [2, 7, 60])
def test_size_and_coverage_on_one_data_set_against_a_loop(score, coverage, number, predictions):
    log_probs, target = ragged(predictions, number)
    found = cross_fitted_sets(log_probs, target, coverage=coverage, score=score)
    folds = [n % 2 for n in range(number)]
    expected = cross_fitted_by_hand(log_probs, target, folds, coverage, score)
    assert (found.size.item(), found.coverage.item()) == pytest.approx(expected, abs=1e-12)
    assert found.coverage >= accuracy(log_probs, target)


@SCORE
@pytest.mark.parametrize("number", [1, 3, 41])
def test_resamples_against_a_loop_over_drawn_rows(score, number, predictions, monkeypatch):
    # Chunks of a few resamples each.
    monkeypatch.setattr("bmoe_lightning.metrics.conformal._CHUNK", 1000)
    log_probs, target = ragged(predictions, number)
    [drawn] = draw_resamples(number, 25, 3)
    sizes = get_metric(f"set_size_{score}").resampled(log_probs, target, BINNING)(drawn)
    covered = get_metric(f"set_coverage_{score}").resampled(log_probs, target, BINNING)(drawn)
    assert sizes.shape == covered.shape == (25,)
    for s, row in enumerate(drawn.indices):
        # A copy is in the fold of its example.
        expected = cross_fitted_by_hand(log_probs[row], target[row], (row % 2).tolist(), 0.9, score)
        assert (sizes[s].item(), covered[s].item()) == pytest.approx(expected, abs=1e-12)


@SCORE
@pytest.mark.parametrize("coverage", [0.6, 0.9])
def test_the_classes_have_the_values_of_the_function(score, coverage, predictions):
    log_probs, target = ragged(predictions, 50)
    expected = cross_fitted_sets(log_probs, target, coverage=coverage, score=score)
    for twin, value in (
        (SetSize(score, coverage), expected.size),
        (SetCoverage(score, coverage), expected.coverage),
    ):
        for part in (slice(0, 1), slice(1, 18), slice(18, 50)):
            twin.update(log_probs[part], target[part])
        torch.testing.assert_close(twin.compute(), value, rtol=0, atol=1e-12)


def test_the_registered_metrics(predictions):
    log_probs, target = predictions(50)
    for score in ("lac", "aps"):
        size, covered = get_metric(f"set_size_{score}"), get_metric(f"set_coverage_{score}")
        expected = cross_fitted_sets(log_probs, target, coverage=0.9, score=score)
        assert size.value(log_probs, target, BINNING) == expected.size
        assert covered.value(log_probs, target, BINNING) == expected.coverage
        assert size.header == f"Set size {score.upper()} ↓"
        # It has a target, so no direction.
        assert covered.higher_is_better is None
        assert covered.header == f"Set coverage {score.upper()}"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda lp, y: conformal_threshold(lp, y, coverage=1.0), ValueError, "coverage must lie between 0 and 1"),
        (lambda lp, y: conformal_threshold(lp, y, score="raps"), ValueError, r"\('lac', 'aps'\), found 'raps'"),
        (lambda lp, y: conformal_threshold(lp.exp(), y), ValueError, "log_softmax"),
        (lambda lp, y: conformal_threshold(lp, y.double()), TypeError, "class indices"),
        (lambda lp, y: cross_fitted_sets(lp, y, coverage=0.0), ValueError, "coverage must lie between 0 and 1"),
        (lambda lp, y: cross_fitted_sets(lp, y + 4), ValueError, r"target must lie in \[0, 4\)"),
        (lambda lp, y: prediction_sets(lp, 0.1, score="raps"), ValueError, "score must be one of"),
        (lambda lp, y: prediction_sets(lp, math.nan, score="lac"), ValueError, "threshold must be a scalar"),
        (lambda lp, y: prediction_sets(lp, torch.ones(4), score="lac"), ValueError, "threshold must be a scalar"),
        (lambda lp, y: prediction_sets(lp.exp(), 0.1, score="lac"), ValueError, "log_softmax"),
        (lambda lp, y: prediction_sets(lp[0], 0.1, score="lac"), ValueError, r"expected log_probs \[N, K\]"),
        (lambda lp, y: prediction_sets(lp[:0], 0.1, score="lac"), ValueError, "at least one example"),
        (lambda lp, y: prediction_sets(y[:, None], 0.1, score="lac"), TypeError, "floating tensor"),
        (lambda lp, y: PredictionSets("lac", 0.9, math.nan, 5), ValueError, "threshold must not be NaN"),
        (lambda lp, y: PredictionSets("lac", 0.9, 1.0, 0), ValueError, "num_labels must be at least 1"),
        (lambda lp, y: PredictionSets("raps", 0.9, 1.0, 5), ValueError, "score must be one of"),
        (lambda lp, y: PredictionSets.fit(lp, y, coverage=2.0), ValueError, "coverage must lie between 0 and 1"),
        (lambda lp, y: check_num_labels(5, 1.0), ValueError, "coverage must lie between 0 and 1"),
        (lambda lp, y: check_num_labels(8, 0.9), ValueError, "give at least 9, or a lower coverage"),
        (lambda lp, y: SetSize(coverage=1.5), ValueError, "coverage must lie between 0 and 1"),
        (lambda lp, y: SetCoverage("raps"), ValueError, "score must be one of"),
    ],
)
def test_refusals(call, error, message, predictions):
    with pytest.raises(error, match=message):
        call(*predictions(5))
