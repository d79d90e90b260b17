"""What is decided about a score: its direction, its interval, and a null result."""

from __future__ import annotations

import pytest
import torch

from bmoe_lightning.laplace import ANSWER_SCORES
from bmoe_lightning.metrics import Estimate, detect_errors, rejection_ratio_interval
from bmoe_lightning.report import SummarySettings
from recipes.generation.comparison import BASELINE, ScoreValue, compare
from recipes.generation.experiment import ScoredAnswers
from recipes.generation.report import LABELS, comparison_table, verdict, write_report
from recipes.generation.settings import GenerationSettings

SETTINGS = SummarySettings(num_samples=200)


def answers(seed, *, task="addition", count=150):
    """A baseline that knows something, a score that knows everything, one that is turned round, and one of noise."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(count, generator=generator) < 0.5
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    scores = dict.fromkeys(LABELS, noise)
    scores[BASELINE] = noise - right.double()
    scores["token_entropy"] = -right.double()
    scores["posterior_variance"] = right.double()
    scores["length_normalised"] = scores[BASELINE] + 0.01 * torch.rand(count, generator=generator)
    shown = [{"prompt": "1 + 1 =", "answer": "2 .", "written": "3"}]
    return ScoredAnswers(task, seed, right, scores, {"answers": shown, "options": {}})


def test_a_better_a_worse_and_an_equal_score_are_told_apart():
    (found,) = compare([answers(seed) for seed in (0, 1, 2)], SETTINGS)
    assert found.seeds == (0, 1, 2)
    assert found.num_questions == 150
    for measure, best in (("prr", 1.0), ("auroc", 1.0)):
        values = {name: of_score[measure] for name, of_score in found.values.items()}
        assert values["token_entropy"].estimate.value == pytest.approx(best)
        assert values["token_entropy"].verdict == "better"
        assert values["posterior_variance"].verdict == "worse"
        assert values["length_normalised"].verdict == "no difference is decided"
        assert values[BASELINE].verdict == "baseline"
        assert values[BASELINE].difference is None
        for value in values.values():
            assert value.estimate.low <= value.estimate.value <= value.estimate.high
        # The isotropic variance is noise here, and the posterior's the worst order.
        assert found.curvature[measure].high < 0
    said = verdict(found)
    assert "The variance under the posterior less the isotropic variance: PRR -" in said
    assert "By PRR, against the sequence probability: better: mean token entropy; worse: variance under" in said
    assert "no difference is decided for sequence probability for each token" in said


def test_one_seed_has_the_intervals_of_the_metrics():
    one = answers(0)
    (found,) = compare([one], SummarySettings(num_samples=200))
    score, value = one.scores[BASELINE], found.values[BASELINE]
    expected = rejection_ratio_interval(score, one.right.double(), num_samples=200)
    assert vars(value["prr"].estimate) == pytest.approx(vars(expected))
    expected = detect_errors(score, ~one.right, num_samples=200)["auroc"]
    assert vars(value["auroc"].estimate) == pytest.approx(vars(expected))


def test_a_difference_that_contains_zero_decides_nothing():
    estimate = Estimate(0.5, 0.4, 0.6)
    assert ScoreValue(estimate, Estimate(0.1, -0.01, 0.2), ()).verdict == "no difference is decided"
    assert ScoreValue(estimate, Estimate(0.1, 0.01, 0.2), ()).verdict == "better"
    assert ScoreValue(estimate, Estimate(-0.1, -0.2, -0.01), ()).verdict == "worse"


def test_every_score_of_answers_has_a_label():
    assert tuple(LABELS) == ANSWER_SCORES


def test_answers_that_are_all_wrong_decide_nothing():
    one = answers(0)
    wrong = ScoredAnswers(one.task, 0, torch.zeros_like(one.right), one.scores, one.description)
    (found,) = compare([wrong], SETTINGS)
    assert found.values["token_entropy"]["prr"].verdict == "no difference is decided"
    assert "nan" in comparison_table(found)


def test_the_report_has_all_tasks_and_is_written_again(tmp_path):
    found = [answers(seed, task=task) for task in ("addition", "recall") for seed in (0, 1)]
    comparisons = compare(found, SETTINGS)
    settings = GenerationSettings(output_dir=str(tmp_path))
    report = write_report(found, comparisons, settings)
    text = report.read_text()
    assert all(comparison_table(of_task) in text for of_task in comparisons)
    assert all(verdict(of_task) in text for of_task in comparisons)
    assert "| 1 + 1 = | 2 . | 3 |" in text
    assert not text.startswith("# DRY RUN")
    write_report(found, comparisons, settings)
    assert report.read_text() == text
    for name in ("", *LABELS):
        assert len(list((tmp_path / "tensorboard" / name).glob("events.out.tfevents.*"))) == 1
