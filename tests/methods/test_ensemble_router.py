"""Deep-ensemble routers: members from runs of their own, their predictions, and refusals."""

from __future__ import annotations

import pytest
import torch
from methods_cases import predict
from oracles.models import answer_logits
from torch.utils.data import DataLoader
from weight_router_cases import adamw, adamw_rate, fit, labelled, permuted, probabilities, swapped, trained_shifts

from bmoe_lightning.methods import BatchView, EnsembleRouter
from bmoe_lightning.methods.routes import route_information
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.methods.training_data import Batches


def test_its_members_are_fine_tuned_in_runs_of_other_orders(model, tmp_path):
    train = labelled(model, 8, 8, 5, 3)
    method = EnsembleRouter(epochs=2, size=3, learning_rate=0.02)
    found, state = fit(method, model, train, train)
    members = [trained_shifts(model, 2 * [permuted(train, run)], adamw, adamw_rate(0.02))[-1] for run in range(3)]
    for index in range(2):
        expected = torch.stack([member[index] for member in members])
        torch.testing.assert_close(state[f"net.{index}.shifts"], expected, rtol=1e-7, atol=1e-10)
        assert (expected[0] - expected[1]).abs().max() > 1e-4
    routes = torch.stack([probabilities(swapped(model, member), train[0]) for member in members])
    log_probs = predict(method, model, train[0], state)
    torch.testing.assert_close(log_probs.exp(), routes.mean(0), rtol=1e-7, atol=1e-9)
    scores = method.uncertainty(BatchView(model, answer_logits, train[0]), state)
    torch.testing.assert_close(scores["mutual_information"], route_information(routes.log()), rtol=1e-5, atol=1e-9)
    assert (scores["router_logit_variance"] > 0).all()
    assert method.hyperparameters(state)["members"] == 3
    save_fit(tmp_path, found)
    assert torch.equal(predict(method, model, train[0], load_fit(tmp_path)[0].state_of(method)), log_probs)


def test_equal_members_are_said(model):
    (batch,) = labelled(model, 8)
    method = EnsembleRouter(epochs=1, size=2)
    found, state = fit(method, model, [batch], [batch])
    assert torch.equal(*state["net.0.shifts"])
    assert any("members of ensemble_router are equal" in sentence for sentence in found.warnings_of(method))


def test_a_loader_that_shuffles_has_other_orders_and_keeps_its_state():
    loader = DataLoader(list(range(8)), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))
    state, global_state = loader.generator.get_state(), torch.get_rng_state()
    data = Batches(loader)
    orders = [[batch.tolist() for batch in data.batches(3, order=order)] for order in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]
    assert [len(order) for order in orders] == [3, 3, 3]
    assert torch.equal(loader.generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), global_state)
    listed = Batches([*"abcdef"])
    assert [*listed.batches(None)] == [*"abcdef"]
    assert [*listed.batches(None, order=1)] == permuted([*"abcdef"], 1) != [*"abcdef"]
    assert [*listed.batches(2, order=1)] == permuted([*"abcdef"], 1)[:2]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"epochs": 0}, "trains its members"),
        ({"size": 0}, "trains its members"),
        ({"samples_per_pass": 0}, "at least one sample"),
        ({"average": "scores"}, "give it a name and a label"),
    ],
)
def test_refused_options(options, found):
    with pytest.raises(ValueError, match=found):
        EnsembleRouter(**options)
