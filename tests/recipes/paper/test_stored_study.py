"""The index of a study on disk."""

from __future__ import annotations

import torch

from bmoe_lightning.data import Question
from bmoe_lightning.methods import FitResult, Predictions, get_method
from recipes.paper.outcomes import Study
from recipes.paper.stored_study import read_study, stored_outcomes, write_study
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.settings import Settings
from recipes.qwen_obqa.sources import Source
from recipes.qwen_obqa.zero_shot import ZERO_SHOT

MAP = get_method("map")
QUESTIONS = tuple(Question(f"q{number}", f"Question {number}?", ("no", "yes"), number % 2) for number in range(6))


def predictions(seed):
    logits = torch.randn(len(QUESTIONS), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = torch.tensor([question.answer for question in QUESTIONS])
    return Predictions(logits.log_softmax(-1), labels, logits)


def finished(output, *, zero_shot):
    chosen = Settings(model="somebody/model", methods=("map",), zero_shot=zero_shot, seeds=2, first_seed=3)
    settings = chosen.resolved()
    source = Source(settings, "somebody/model", "", QUESTIONS, QUESTIONS, QUESTIONS, "")
    runs = [SeedRun(settings, source, (MAP,), output / "runs" / "mine-experts", seed, "identity") for seed in (3, 4)]
    for run in runs:
        run.predictions.write(MAP, FitResult(seed=run.seed), predictions(run.seed))
    if zero_shot:
        runs[0].predictions.write(ZERO_SHOT, FitResult(seed=3), predictions(0))
    return runs


def read_back(output, *, zero_shot):
    outcomes = stored_outcomes(output, "mine", "experts", finished(output, zero_shot=zero_shot))
    write_study(output, Study("small", "somebody/model", "mine", {"mine": "Mine"}, (1,), (), ()), outcomes)
    return read_study(output).results("mine", "mine")


def test_predictions_are_those_of_each_seed(tmp_path):
    results = read_back(tmp_path, zero_shot=False)
    assert [(result.method, result.seed) for result in results] == [("map", 3), ("map", 4)]
    for result in results:
        torch.testing.assert_close(result.log_probs, predictions(result.seed).log_probs)


def test_all_seeds_have_the_predictions_before_fine_tuning_that_the_first_one_has_made(tmp_path):
    results = read_back(tmp_path, zero_shot=True)[2:]
    assert [(result.method, result.label, result.seed) for result in results] == [
        ("zero_shot", "Zero-shot", 3),
        ("zero_shot", "Zero-shot", 4),
    ]
    for result in results:
        assert result.ids == tuple(question.id for question in QUESTIONS)
        torch.testing.assert_close(result.log_probs, predictions(0).log_probs)
