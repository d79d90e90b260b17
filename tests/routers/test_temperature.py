"""Routers that draw their experts: the limits, the penalty, the score function, and the alarm for a collapse."""

from __future__ import annotations

import math

import pytest
import torch
from oracles.models import answer_logits as answers
from oracles.models import tiny_qwen, toy_batch

from bmoe_lightning.routers import (
    BayesianRouter,
    CollapseWatch,
    PositionNoise,
    Router,
    StepDraws,
    TemperatureChoice,
    averaged_scores,
    find_routers,
    mean_routers,
    probe_routers,
    sampled_routes,
)

ROUTER = Router("router", 0, 5, 8, "experts", top_k=2, score="softmax")
BATCH = toy_batch()


def draws(count, step=0):
    return StepDraws(ROUTER, count, seed=0, step=step, call=0, device=torch.device("cpu"))


def tokens(count=400, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, width, generator=generator, dtype=torch.float64) for width in (8, 5)]


def colder(net, bias):
    net.bias.data.fill_(bias)
    return net


def test_it_starts_at_a_temperature_of_one_without_penalty():
    net, (u, logits) = TemperatureChoice(ROUTER, dtype=torch.float64), tokens()
    torch.testing.assert_close(net.temperature(u), torch.ones(400, dtype=torch.float64))
    found = net.trained(u, logits, draws(400))
    torch.testing.assert_close(found.penalty, torch.zeros(400, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (found.logits.isfinite().sum(1) == 2).all()
    # The weights are the probabilities of the chosen experts.
    chosen = found.logits.isfinite()
    torch.testing.assert_close(found.logits[chosen], logits.log_softmax(-1)[chosen])
    # Every pair of experts is drawn, and none by all tokens, as ties of one-hot draws would be.
    assert len({tuple(row.nonzero().flatten().tolist()) for row in chosen}) == 10
    uniform = net.samples(u, torch.zeros_like(logits), draws(400))[0].isfinite().double().mean(0)
    assert uniform.max() < 0.6


@pytest.mark.parametrize("returns_choice", [False, True])
@pytest.mark.parametrize("temper_weights", [False, True])
def test_averages_of_choices_are_those_of_their_samples(returns_choice, temper_weights):
    options = {"returns_choice": returns_choice, "temper_weights": temper_weights, "dtype": torch.float64}
    net, (u, logits) = colder(TemperatureChoice(ROUTER, **options), 1.7), tokens(40)
    chunks = [draws(40, step) for step in range(9)]
    found, expected = net.averaged(u, logits, chunks), BayesianRouter.averaged(net, u, logits, chunks)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert (found == -torch.inf).any()
    weights = torch.stack([net.samples(u, logits, chunk)[0].exp() for chunk in chunks])
    if returns_choice:
        torch.testing.assert_close(found.exp(), weights.mean(0), rtol=1e-9, atol=1e-12)
    else:
        normalised = weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(found.softmax(-1), normalised.mean(0), rtol=1e-9, atol=1e-12)


def test_the_penalty_is_bounded():
    net, (u, logits) = TemperatureChoice(ROUTER, dtype=torch.float64), tokens()
    for bias in (-30.0, 30.0):
        penalty = colder(net, bias).trained(u, logits, draws(400)).penalty
        assert penalty.isfinite().all()
        assert (penalty < 20).all()
        assert (penalty > 0).all()


def test_gradients_are_those_of_finite_differences():
    net, (u, logits) = TemperatureChoice(ROUTER, dtype=torch.float64), tokens(5)
    for parameter in net.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator())

    def penalty(head, bias):
        return torch.func.functional_call(_Penalty(net), {"net.head": head, "net.bias": bias}, (u, logits))

    values = [value.detach().clone().requires_grad_() for value in (net.head, net.bias)]
    assert torch.autograd.gradcheck(penalty, values)


class _Penalty(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, u, logits):
        return self.net.penalty(logits, self.net.temperature(u))


def test_the_score_function_gives_the_gradient_of_the_expected_loss():
    """Of a loss that sees the set alone, through which no gradient passes."""
    logits = torch.tensor([[1.0, 0.2, -0.5, 0.1, -1.0]], dtype=torch.float64)
    u = torch.zeros(1, 8, dtype=torch.float64)
    value = torch.tensor([3.0, 1.0, -2.0, 0.5, -3.0], dtype=torch.float64)
    net = TemperatureChoice(ROUTER, temper_weights=False, dtype=torch.float64)

    def expected(bias):
        temperature = torch.nn.functional.softplus(bias)
        p = (logits[0] / temperature).softmax(-1)
        total = 0.0
        for first in range(5):
            for second in range(5):
                if first != second:
                    total = total + p[first] * p[second] / (1 - p[first]) * (value[first] + value[second])
        return total

    bias = net.bias.detach().clone().requires_grad_()
    (exact,) = torch.autograd.grad(expected(bias), bias)
    count = 100_000
    found = net.trained(u.expand(count, -1), logits.expand(count, -1), draws(count))
    losses = (found.logits.isfinite() * value).sum(1)
    assert not found.logits[found.logits.isfinite()].requires_grad
    (estimate,) = torch.autograd.grad((found.log_probability * (losses - losses.mean())).mean(), net.bias)
    assert float(estimate) == pytest.approx(float(exact), rel=0.05)


@pytest.fixture(scope="module", params=[False, True], ids=["not_normalised", "normalised"])
def case(request):
    model = tiny_qwen(norm_topk_prob=request.param, dtype=torch.float32)

    def run(context=None):
        with torch.no_grad():
            if context is None:
                return answers(model, BATCH)[0]
            with context:
                return answers(model, BATCH)[0]

    return model, probe_routers(model, find_routers(model), run), run, not request.param


class TestModel:
    def nets(self, routers, returns_choice, **options):
        return [TemperatureChoice(router, returns_choice=returns_choice, **options) for router in routers]

    def test_without_temperature_it_is_the_model_if_weights_are_not_tempered(self, case):
        model, routers, run, returns_choice = case
        nets = self.nets(routers, returns_choice, temper_weights=False, bounds=(1e-9, 20.0))
        for net in nets:
            colder(net, -30.0)
        noise = PositionNoise(0)
        torch.testing.assert_close(run(sampled_routes(model, nets, [0], noise)), run(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run(averaged_scores(model, nets, 1, noise)), run(), rtol=1e-5, atol=1e-5)
        assert torch.equal(run(mean_routers(model, nets)), run())
        for net in nets:
            net.temper_weights = True  # one expert gets all weight
        assert not torch.allclose(run(sampled_routes(model, nets, [0], noise)), run(), atol=1e-3)

    def test_one_averaged_sample_is_that_route(self, case):
        model, routers, run, returns_choice = case
        nets = self.nets(routers, returns_choice)
        noise = PositionNoise(4)
        route = run(sampled_routes(model, nets, [0], noise))
        torch.testing.assert_close(run(averaged_scores(model, nets, 1, noise)), route, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(route, run(), atol=1e-3)


@pytest.mark.parametrize(("top_k", "score", "found"), [(None, "softmax", "unknown"), (2, "sigmoid", "'sigmoid'")])
def test_what_cannot_be_drawn_is_refused(top_k, score, found):
    with pytest.raises(ValueError, match=found):
        TemperatureChoice(Router("router", 0, 5, 8, "experts", top_k=top_k, score=score))


def steps(penalty, count=60):
    """The mean temperature and entropy along a training whose loss likes a small temperature a little."""
    u, logits = tokens(64)
    net = TemperatureChoice(ROUTER, dtype=torch.float64)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.3)
    watch, alarm = CollapseWatch(5, patience=10), False
    for step in range(count):
        found = net.trained(u, logits, draws(64, step))
        temperature = net.temperature(u)
        loss = penalty(net, found, temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means = {name: float(values.mean()) for name, values in found.statistics.items()}
        alarm = watch.observe(means["gate_temperature"], means["gate_entropy"]) or alarm
    return means, alarm


def test_the_alarm_notices_the_penalty_of_the_papers_and_not_the_bounded_one():
    means, alarm = steps(lambda _net, _found, temperature: -temperature.log().mean())
    assert alarm
    assert means["gate_entropy"] > 0.99 * math.log(5)
    means, alarm = steps(lambda _net, found, temperature: found.penalty.mean() + 0.05 * temperature.mean())
    assert not alarm
    assert 0.1 < means["gate_temperature"] < 10
    assert 0.05 * math.log(5) < means["gate_entropy"] < 0.95 * math.log(5)


@pytest.mark.parametrize(("temperature", "entropy"), [(0.05, 1.0), (20.0, 1.0), (1.0, 0.001), (1.0, 1.6)])
def test_the_alarm_takes_steps_in_a_row(temperature, entropy):
    watch = CollapseWatch(5, patience=3)
    assert [watch.observe(temperature, entropy) for _ in range(3)] == [False, False, True]
    assert not watch.observe(1.0, 1.0)
