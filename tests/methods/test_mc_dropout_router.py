"""MC-dropout routers: the fit of the rate, routes, training with dropout, and refusals."""

from __future__ import annotations

import pytest
import torch
from methods_cases import predict
from oracles.models import answer_logits
from torch import nn
from torch.nn.functional import nll_loss
from weight_router_cases import fit, labelled

from bmoe_lightning.methods import MAP, BatchView, MCDropoutRouter
from bmoe_lightning.methods.routes import route_information
from bmoe_lightning.methods.storage import load_fit, save_fit
from bmoe_lightning.routers import DropoutInputs, PositionNoise, find_routers, router_weight, sampled_routes


def dropout_nets(model, rate, shifts=None):
    nets = []
    for router in find_routers(model):
        net = DropoutInputs(router, router_weight(model, router), rate, trains_weight=bool(shifts), dtype=torch.float64)
        if shifts:
            net.shift.data.copy_(shifts[router.index])
        nets.append(net)
    return nets


def averaged(model, batch, nets, num_samples, seed=0):
    noise, routes = PositionNoise(seed), []
    for sample in range(num_samples):
        with torch.no_grad(), sampled_routes(model, nets, [sample], noise):
            routes.append(answer_logits(model, batch)[0].log_softmax(-1))
    return torch.stack(routes)


@pytest.mark.parametrize("per_pass", [1, 3])
def test_the_rate_is_the_one_of_least_held_out_loss(model, tmp_path, per_pass):
    (batch,) = held_out = labelled(model, 60)
    method = MCDropoutRouter(num_samples=4, rates=(0.5, 0.2), samples_per_pass=per_pass)
    found, state = fit(method, model, [], held_out)
    rate = method.hyperparameters(state)["rate"]
    losses = {0.0: float(nll_loss(predict(MAP(), model, batch), batch["labels"]))}
    for candidate in (0.2, 0.5):
        routes = averaged(model, batch, dropout_nets(model, candidate), 4)
        losses[candidate] = float(nll_loss(routes.exp().mean(0).log(), batch["labels"]))
    assert rate == min(losses, key=losses.get) > 0
    assert state["held_out_nll"].tolist() == pytest.approx([losses[0.0], losses[rate]], rel=1e-9)
    assert "net.0.shift" not in state
    assert not method.needs.training_labels
    routes = averaged(model, batch, dropout_nets(model, rate), 4, seed=5)
    log_probs = predict(method, model, batch, state, seed=5)
    torch.testing.assert_close(log_probs.exp(), routes.exp().mean(0), rtol=1e-9, atol=1e-12)
    assert (routes[0] - routes[1]).abs().max() > 1e-3
    scores = method.uncertainty(BatchView(model, answer_logits, batch, seed=5), state)
    torch.testing.assert_close(scores["mutual_information"], route_information(routes), rtol=1e-9, atol=1e-12)
    assert set(scores) == {"mutual_information", "router_logit_variance", "router_gate_entropy"}
    assert (scores["router_logit_variance"] > 0).all()
    save_fit(tmp_path, found)
    assert torch.equal(predict(method, model, batch, load_fit(tmp_path)[0].state_of(method), seed=5), log_probs)


def test_weights_that_are_trained_with_dropout(model):
    train = labelled(model, 12, 12, 6)
    method = MCDropoutRouter(num_samples=4, rate=0.2, epochs=2, learning_rate=0.05)
    _, state = fit(method, model, train, train)
    assert float(state["epoch"]) >= 1
    assert method.needs.training_labels
    shifts = [state[f"net.{index}.shift"] for index in range(2)]
    assert all(shift.abs().max() > 0.01 for shift in shifts)
    routes = averaged(model, train[0], dropout_nets(model, 0.2, shifts), 4)
    torch.testing.assert_close(predict(method, model, train[0], state).exp(), routes.exp().mean(0))


def test_no_rate_that_helps_is_said(model):
    (batch,) = labelled(model, 30)
    with torch.no_grad():
        batch = {**batch, "labels": answer_logits(model, batch)[0].argmax(1)}
    method = MCDropoutRouter(num_samples=2, rates=(0.3,))
    found, state = fit(method, model, [], [batch])
    assert method.hyperparameters(state)["rate"] == 0
    assert any("fitted as 0" in sentence for sentence in found.warnings_of(method))
    assert torch.equal(predict(method, model, batch, state), predict(MAP(), model, batch))


def test_averaged_scores_are_one_pass_under_a_name_of_their_own(model):
    (batch,) = labelled(model, 30)
    method = MCDropoutRouter(num_samples=8, rate=0.3, average="scores", name="of_scores", label="Of scores")
    _, state = fit(method, model, [], [batch])
    calls = []

    def counted(model, batch):
        calls.append(batch)
        return answer_logits(model, batch)

    log_probs = method.log_probs(BatchView(model, counted, batch), state)
    assert len(calls) == 1
    assert not torch.allclose(log_probs, predict(MAP(), model, batch), atol=1e-4)


def test_logits_that_the_weight_alone_does_not_make_are_refused(model):
    router = model.layers[1].mixture.router
    nn.utils.parametrizations.weight_norm(router)
    router.parametrizations.weight.original1.data *= 3
    (batch,) = labelled(model, 8)
    method = MCDropoutRouter(num_samples=2, rates=(0.3,))
    with pytest.raises(ValueError, match="are not its weight times its input"):
        method.check_routers(model, find_routers(model), lambda: answer_logits(model, batch)[0])
    with pytest.raises(ValueError, match="are not its weight times its input"):
        fit(method, model, [], [batch])


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"average": "logits"}, "valid are predictions, scores"),
        ({"average": "scores"}, "give it a name and a label"),
        ({"rate": 0.0}, "must be in"),
        ({"rate": 1.0}, "must be in"),
        ({"rates": ()}, "must be in"),
        ({"num_samples": -1}, "at least one sample"),
    ],
)
def test_refused_options(options, found):
    with pytest.raises(ValueError, match=found):
        MCDropoutRouter(**options)
