from contextlib import nullcontext
from functools import partial

import pytest
import torch
from methods_cases import predictions
from oracles.models import answer_logits

from bmoe_lightning.methods import MAP, CheckpointEnsemble, FitResult, average_log_probs, save_snapshot
from bmoe_lightning.methods.base import scalar
from bmoe_lightning.methods.evaluation import Evaluation, Predictor
from bmoe_lightning.methods.fit_result import FittedMethod

DOWN = "layers.0.mixture.crew.down_proj"


def test_averages_probabilities_without_underflow():
    log_probs = torch.tensor([[[-1000.0, -1001.0, -torch.inf]], [[-1000.0, -999.0, -torch.inf]]], dtype=torch.float64)
    found = average_log_probs(log_probs)
    expected = -1000 + (torch.tensor([[0.0, -1.0]]).exp() + torch.tensor([[0.0, 1.0]]).exp()).double().div(2).log()
    torch.testing.assert_close(found[:, :2], expected)
    assert found[0, 2] == -torch.inf


def test_keeps_the_order_of_the_data_and_of_the_methods(model, batches, tmp_path):
    save_snapshot(tmp_path / "s", {DOWN: model.get_parameter(DOWN) * 2})
    found = predictions(model, batches, CheckpointEnsemble(), MAP(), snapshots=[tmp_path / "s"])
    assert list(found) == ["checkpoint_ensemble", "map"]
    for one in found.values():
        assert torch.equal(one.labels, torch.cat([batch["labels"] for batch in batches]))
        assert one.log_probs.shape == (10, 4)
        torch.testing.assert_close(one.log_probs.exp().sum(-1), torch.ones(10, dtype=torch.float64))


@pytest.mark.parametrize("fit", ["", "this", "another"])
def test_refuses_snapshots_of_another_fit(model, tmp_path, fit):
    method = CheckpointEnsemble()
    entry = FittedMethod({"members": scalar(1)}, method.fit_options())
    fitted = FitResult(fit_id="this", methods={method.name: entry})
    save_snapshot(tmp_path / "s", {DOWN: model.get_parameter(DOWN) * 2}, fit=fit)
    for make in (partial(Evaluation, [MAP(), method]), partial(Predictor, method)):
        with pytest.raises(ValueError, match="belongs to another fit") if fit == "another" else nullcontext():
            make(fitted, [tmp_path / "s"])
    Evaluation([MAP()], fitted, [tmp_path / "s"])


def test_refuses_no_data_and_no_labels(model, batches):
    with pytest.raises(ValueError, match="the data are empty"):
        predictions(model, [], MAP())
    bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    with pytest.raises(ValueError, match="needs labels"):
        predictions(model, bare, MAP())


def test_refuses_probabilities(model, batches):
    def wrong(model, batch):
        logits, labels = answer_logits(model, batch)
        return logits.softmax(-1), labels

    with pytest.raises(ValueError, match="returned probabilities"):
        predictions(model, batches, MAP(), class_logits=wrong)
