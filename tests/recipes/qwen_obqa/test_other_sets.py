"""Further test sets of a run: predictions of the fitted methods on questions of other tasks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bmoe_lightning.data import Question
from bmoe_lightning.data.questions import Splits
from recipes.qwen_obqa import seed_run
from recipes.qwen_obqa.experiment import completed_run
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.settings import Settings
from recipes.qwen_obqa.sources import OtherSet, prepare_source

METHODS = ("map", "temperature", "laplace_lpo")


def pairs(source):
    """Questions of a source with two of their choices."""

    def two(questions):
        return tuple(Question(f"pair-{q.id}", q.question, q.choices[:2], min(q.answer, 1)) for q in questions[:5])

    return OtherSet(Splits(two(source.train), two(source.calibration), two(source.test)))


def completed(folder, *, methods=METHODS, with_pairs=True):
    def prepare(settings, methods):
        source = prepare_source(settings, methods)
        return replace(source, others={"pairs": pairs(source)}) if with_pairs else source

    settings = Settings(dry_run=True, quiet=True, accelerator="cpu", methods=methods, output_dir=str(folder))
    with completed_run(settings.resolved(), prepare) as (run,):
        return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return completed(tmp_path_factory.mktemp("run") / "run")


def test_every_method_predicts_them(finished):
    results = {result.method: result for result in finished.results_of("pairs")}
    assert tuple(results) == METHODS
    expected = pairs(finished.source).splits.test
    for result in results.values():
        assert result.log_probs.shape == (5, 2)
        torch.testing.assert_close(result.log_probs.exp().sum(1), torch.ones(5, dtype=torch.float64))
        assert result.target.tolist() == [question.answer for question in expected]
        assert result.ids == tuple(question.id for question in expected)
    temperature = results["temperature"].extra["temperature"]
    logits = finished.predictions_of("pairs").logits(finished.methods[0])
    torch.testing.assert_close(results["temperature"].log_probs, (logits / temperature).log_softmax(-1))


def test_the_test_split_is_not_changed_by_them(finished, tmp_path):
    without = completed(tmp_path / "run", with_pairs=False)
    for one, other in zip(finished.results(), without.results(), strict=True):
        assert torch.equal(one.log_probs, other.log_probs)


def test_a_method_that_is_added_alone_is_evaluated_on_them(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    completed(folder, methods=("map",), with_pairs=False)
    evaluated, evaluate = [], SeedRun._evaluate

    def recorded(self, missing, module, data, stored):
        evaluated.append(([method.name for method in missing], stored.folder.name))
        evaluate(self, missing, module, data, stored)

    monkeypatch.setattr(SeedRun, "_evaluate", recorded)
    checks = []
    monkeypatch.setattr(seed_run, "check_pretrained", lambda *given: checks.append(len(evaluated)))
    completed(folder, methods=("map",))
    completed(folder, methods=("map", "temperature"))
    completed(folder, methods=("map", "temperature"))
    assert checks == [0, 1]  # before the first evaluation of each run that has one
    assert evaluated == [
        (["map"], "predictions-pairs"),
        (["temperature"], "predictions"),
        (["temperature"], "predictions-pairs"),
    ]
