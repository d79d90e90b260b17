"""The options of a deep ensemble, and what does not change its predictions."""

from __future__ import annotations

import json

import pytest
import torch
from methods_cases import fitted, predictions
from oracles.models import answer_logits, toy_model

from bmoe_lightning.methods import DeepEnsemble, save_snapshot
from bmoe_lightning.methods.evaluation import Predictor
from bmoe_lightning.methods.options import trial_options


@pytest.fixture
def runs(tmp_path):
    found = []
    for seed in (3, 4):
        found.append(tmp_path / f"{seed}.safetensors")
        save_snapshot(found[-1], dict(toy_model(seed).named_parameters()))
    return found


def test_paths_are_options_that_a_file_can_hold(runs):
    method = DeepEnsemble(runs=runs)
    assert method.runs == tuple(map(str, runs))
    assert json.loads(json.dumps(method.options()))["runs"] == [str(path) for path in runs]


def test_the_files_are_no_matter_of_the_fit(runs):
    """They may be moved, or trained again."""
    fit = fitted((DeepEnsemble(), {}))
    assert fit.differences(DeepEnsemble(runs=runs)) == []
    assert fit.differences(DeepEnsemble(size=4)) == ["size=3 (here 4)"]


def test_further_runs_are_trained_unless_they_are_given(runs):
    assert DeepEnsemble().needs.runs == 2
    assert DeepEnsemble(runs=runs[:1]).needs.runs == 0
    assert DeepEnsemble(size=2, runs=runs).hyperparameters({}) == {"members": 3}  # what is given counts
    assert trial_options(DeepEnsemble) == {"size": 2}


def test_the_order_of_the_runs_makes_no_difference(model, batches, runs):
    one, other = (
        predictions(model, batches, DeepEnsemble(runs=order))["deep_ensemble"].log_probs for order in (runs, runs[::-1])
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_a_single_batch_is_predicted_as_in_a_whole_data_set(model, batches, runs):
    method = DeepEnsemble(runs=runs)
    expected = predictions(model, batches, method)["deep_ensemble"].log_probs[: len(batches[0]["labels"])]
    log_probs, view = Predictor(method, fitted((method, {}))).predict(model, answer_logits, batches[0])
    torch.testing.assert_close(log_probs, expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(view.logits, answer_logits(toy_model(), batches[0])[0])  # of the current weights
