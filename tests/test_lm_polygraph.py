"""Calculator and estimators of lm-polygraph, with its manager; what the package says without it."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bmoe_lightning.curvature import collect_text_factors
from bmoe_lightning.laplace import ANSWER_SCORES, LaplacePosterior
from bmoe_lightning.models import sequence_log_prob, text_scores, with_answers
from recipes.generation.tasks import make_task
from recipes.generation.training import text_batch, untrained_model

ROOT = Path(__file__).parents[1]
MODULE = "bmoe_lightning.lm_polygraph.posterior_scores"


def test_without_lm_polygraph_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    for name in ("lm_polygraph", "lm_polygraph.estimators.estimator"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"which cannot be imported \(.*\); install the extra lm-polygraph"):
        import_module(MODULE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(entry.startswith("lm-polygraph") for entry in extras["lm-polygraph"])


@pytest.fixture(scope="module")
def polygraph():
    """lm-polygraph and the module, where lm-polygraph and all that it imports are installed."""
    reason = "lm-polygraph is not installed: extra lm-polygraph"
    manager = pytest.importorskip("lm_polygraph.utils.manager", reason=reason, exc_type=ImportError)
    from lm_polygraph.defaults.register_default_stat_calculators import register_default_stat_calculators
    from lm_polygraph.estimators import MaximumSequenceProbability
    from lm_polygraph.generation_metrics.accuracy import AccuracyMetric
    from lm_polygraph.ue_metrics.pred_rej_area import PredictionRejectionArea
    from lm_polygraph.utils.builder_enviroment_stat_calculator import BuilderEnvironmentStatCalculator
    from lm_polygraph.utils.dataset import Dataset
    from lm_polygraph.utils.factory_estimator import FactoryEstimator
    from lm_polygraph.utils.model import WhiteboxModel

    theirs = (AccuracyMetric, BuilderEnvironmentStatCalculator, Dataset, FactoryEstimator, MaximumSequenceProbability)
    theirs += (PredictionRejectionArea, WhiteboxModel, manager.UEManager, register_default_stat_calculators)
    return SimpleNamespace(ours=import_module(MODULE), **{found.__name__: found for found in theirs})


@pytest.fixture(scope="module")
def run(polygraph, tmp_path_factory):
    """Estimates by name of all scores of ours and of one of lm-polygraph, with model, tokenizer, file and prompts."""
    task = make_task("recall", questions=10)
    tokenizer = task.tokenizer()
    model = untrained_model(tokenizer, seed=0).eval()
    file = tmp_path_factory.mktemp("posterior") / "posterior.safetensors"
    texts = [text_batch(tokenizer, task.train)]
    LaplacePosterior(collect_text_factors(model, sequence_log_prob, texts, rank=3), 5.0).save(file)
    white_box = polygraph.WhiteboxModel(model, tokenizer, model_path="tiny")
    by_name = polygraph.FactoryEstimator()
    data = polygraph.Dataset([q.prompt for q in task.test], [q.answer for q in task.test], batch_size=4)
    manager = polygraph.UEManager(
        data,
        white_box,
        [by_name(MODULE, {"score": score}) for score in ANSWER_SCORES] + [polygraph.MaximumSequenceProbability()],
        polygraph.BuilderEnvironmentStatCalculator(white_box),
        [
            *polygraph.register_default_stat_calculators("Whitebox", output_attentions=False),
            polygraph.ours.calculator(file),
        ],
        [polygraph.AccuracyMetric()],
        [polygraph.PredictionRejectionArea()],
        [],
        ignore_exceptions=False,
        verbose=False,
        max_new_tokens=5,
    )
    manager()
    return SimpleNamespace(manager=manager, model=model, tokenizer=tokenizer, file=file, data=data)


def test_estimates_are_those_of_the_posterior(run):
    prompts = run.tokenizer(run.data.x, padding=True, return_tensors="pt")
    answers = with_answers(prompts, run.manager.stats["greedy_tokens"])
    found = {name: torch.tensor(values, dtype=torch.float64) for (_, name), values in run.manager.estimations.items()}
    expected = LaplacePosterior.load(run.file).sequence_variance(run.model, sequence_log_prob, answers.batch)
    close = {"rtol": 1e-4, "atol": 1e-8}
    torch.testing.assert_close(found["Laplace_posterior_variance"], expected.variance, **close)
    torch.testing.assert_close(found["Laplace_isotropic_variance"], expected.isotropic, **close)
    torch.testing.assert_close(found["Laplace_sequence_probability"], -expected.log_prob.double(), **close)
    entropy = text_scores(run.model, answers.batch).token_entropy
    torch.testing.assert_close(found["Laplace_token_entropy"], entropy.double(), **close)
    assert len(found["Laplace_posterior_variance"]) == 10


def test_the_probability_is_that_of_lm_polygraph(run):
    """Its own estimator of it, with the same direction; it takes the end token out of the first position."""
    theirs = run.manager.estimations["sequence", "MaximumSequenceProbability"]
    ours = run.manager.estimations["sequence", "Laplace_sequence_probability"]
    assert ours == pytest.approx(theirs, rel=0.02)


def test_lm_polygraph_rates_the_estimates(run):
    rated = {name for _, name, _, _ in run.manager.metrics}
    assert {f"Laplace_{score}" for score in ANSWER_SCORES} <= rated


def test_a_model_with_other_weights_is_refused(run, polygraph):
    other = polygraph.WhiteboxModel(untrained_model(run.tokenizer, seed=1).eval(), run.tokenizer, model_path="tiny")
    calculator = polygraph.ours.load_stat_calculator({"posterior": str(run.file)}, None)
    with pytest.raises(RuntimeError, match="fitted to other weights"):
        calculator({"greedy_tokens": [[3, 4]]}, run.data.x[:1], other)


def test_an_unknown_score_is_refused(polygraph):
    with pytest.raises(ValueError, match="unknown score 'variance'; valid are sequence_probability,"):
        polygraph.ours.load_estimator({"score": "variance"})
