import pytest
import torch
from oracles.models import answer_logits

from bmoe_lightning.methods import MAP, BatchView, CheckpointEnsemble, average_log_probs, evaluate, save_snapshot

DOWN = "layers.0.mixture.crew.down_proj"


def test_averages_probabilities_without_underflow():
    log_probs = torch.tensor([[[-1000.0, -1001.0, -torch.inf]], [[-1000.0, -999.0, -torch.inf]]], dtype=torch.float64)
    found = average_log_probs(log_probs)
    expected = -1000 + (torch.tensor([[0.0, -1.0]]).exp() + torch.tensor([[0.0, 1.0]]).exp()).double().div(2).log()
    torch.testing.assert_close(found[:, :2], expected)
    assert found[0, 2] == -torch.inf


def test_a_view_runs_the_model_when_asked_and_once(model, batches):
    calls = []

    def counted(model, batch):
        calls.append(model.training)
        return answer_logits(model, batch)

    model.train()
    view = BatchView(model, counted, batches[0])
    assert calls == []
    assert view.logits is view.logits
    assert torch.equal(view.labels, batches[0]["labels"])
    assert calls == [False]
    assert model.training
    view.forward()
    assert len(calls) == 2


def test_keeps_the_order_of_the_data_and_of_the_methods(model, batches, tmp_path):
    save_snapshot(tmp_path / "s", {DOWN: model.get_parameter(DOWN) * 2})
    methods = [CheckpointEnsemble([tmp_path / "s"]), MAP()]
    found = evaluate(methods, model, answer_logits, batches)
    assert list(found) == ["checkpoint_ensemble", "map"]
    for predictions in found.values():
        assert torch.equal(predictions.labels, torch.cat([batch["labels"] for batch in batches]))
        assert predictions.log_probs.shape == (10, 4)
        torch.testing.assert_close(predictions.log_probs.exp().sum(-1), torch.ones(10, dtype=torch.float64))


def test_refuses_no_data_and_no_labels(model, batches):
    with pytest.raises(ValueError, match="the data are empty"):
        evaluate([MAP()], model, answer_logits, [])
    bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    with pytest.raises(ValueError, match="needs labels"):
        evaluate([MAP()], model, answer_logits, bare)


def test_refuses_probabilities(model, batches):
    def wrong(model, batch):
        logits, labels = answer_logits(model, batch)
        return logits.softmax(-1), labels

    with pytest.raises(ValueError, match="returned probabilities"):
        evaluate([MAP()], model, wrong, batches)
