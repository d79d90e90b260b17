"""Mean-field, full-covariance and low-rank routers: limits, divergences against torch.distributions, and state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles.models import answer_logits, toy_batch, toy_model
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from bmoe_lightning.routers import (
    FullCovarianceLogits,
    MeanFieldLogits,
    PositionNoise,
    Router,
    StepDraws,
    averaged_scores,
    check_router_weights,
    find_routers,
    load_router_state,
    mean_routers,
    router_fingerprint,
    router_state,
    sampled_routes,
)

ROUTER = Router("router", 0, 5, 12, "experts", top_k=2, score="softmax")
KINDS = {
    "mean_field": MeanFieldLogits,
    "triangular": FullCovarianceLogits,
    "low_rank": lambda router, scale, **options: FullCovarianceLogits(router, scale, rank=2, **options),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def trained(kind, prior_scale=0.7, router=ROUTER, seed=0):
    net = kind(router, prior_scale, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data += 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return net


def tokens(count=6, dtype=torch.float64, router=ROUTER):
    generator = torch.Generator().manual_seed(3)
    shapes = (count, router.d_in), (count, router.num_experts)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def draws(count=6, step=0):
    return StepDraws(ROUTER, count, seed=0, step=step, call=0, device=torch.device("cpu"))


@kinds
def test_the_penalty_is_the_divergence_of_torch_distributions(kind):
    net, (u, logits) = trained(kind), tokens()
    found = net.distribution(u, logits)
    assert not torch.allclose(found.mean, logits)
    own = MultivariateNormal(found.mean, found.covariance())
    prior = Independent(Normal(logits, torch.full_like(logits, 0.7)), 1)
    expected = kl_divergence(own, MultivariateNormal(logits, 0.49 * torch.eye(5, dtype=torch.float64)))
    torch.testing.assert_close(net.trained(u, logits, draws()).penalty, expected, rtol=1e-10, atol=1e-10)
    if kind is MeanFieldLogits:
        expected = kl_divergence(Independent(Normal(found.mean, found.scale), 1), prior)
        torch.testing.assert_close(net.trained(u, logits, draws()).penalty, expected, rtol=1e-10, atol=1e-10)


@kinds
def test_gradients_are_those_of_finite_differences(kind):
    net, (u, logits) = trained(kind), tokens(count=3)
    names = [f"net.{name}" for name, _ in net.named_parameters()]

    def both(*values):
        return torch.func.functional_call(_Trained(net), dict(zip(names, values, strict=True)), (u, logits))

    assert torch.autograd.gradcheck(both, [p.detach().clone().requires_grad_() for p in net.parameters()], atol=1e-6)


class _Trained(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, u, logits):
        found = self.net.trained(u, logits, draws(len(u)))
        return found.logits, found.penalty


@kinds
def test_it_starts_at_the_prior(kind):
    net, (u, logits) = kind(ROUTER, 0.7, dtype=torch.float64), tokens()
    found = net.distribution(u, logits)
    assert torch.equal(found.mean, logits)
    torch.testing.assert_close(found.covariance(), 0.49 * torch.eye(5, dtype=torch.float64).expand(6, 5, 5))
    step = net.trained(u, logits, draws())
    torch.testing.assert_close(step.penalty, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(step.statistics["scale_ratio"], torch.ones(6, dtype=torch.float64))
    expected = logits + 0.7 * draws().of_tokens(net.distribution(u, logits).noise_width)[0][:, :5]
    torch.testing.assert_close(step.logits, expected)
    assert not torch.equal(net.trained(u, logits, draws(step=1)).logits, step.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds
def test_untrained_means_and_a_scale_of_zero_are_bitwise_the_model(kind, dtype):
    model, batch = toy_model().to(dtype), toy_batch()

    def logits(context=None):
        with torch.no_grad():
            if context is None:
                return answer_logits(model, batch)[0]
            with context:
                return answer_logits(model, batch)[0]

    plain, noise = logits(), PositionNoise(0)
    for scale in (0.0, 1.0):
        nets = [kind(router, scale) for router in find_routers(model)]
        assert torch.equal(logits(mean_routers(model, nets)), plain)
        assert torch.equal(logits(sampled_routes(model, nets, [0], noise)), plain) == (scale == 0)
    double = model.double()
    nets = [kind(router, 1e-14, dtype=torch.float64) for router in find_routers(double)]
    torch.testing.assert_close(logits(sampled_routes(double, nets, [0], noise)), logits(), rtol=0, atol=1e-12)
    probed = [replace(net.router, score="softmax") for net in nets]
    nets = [kind(router, 1e-14, dtype=torch.float64) for router in probed]
    torch.testing.assert_close(logits(averaged_scores(double, nets, 4, noise)), logits(), rtol=0, atol=1e-12)


@kinds
def test_a_strong_penalty_gives_the_prior(kind):
    net, (u, logits) = trained(kind), tokens()
    target = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for step in range(200):
        found = net.trained(u, logits, draws(step=step))
        loss = 1e-4 * (found.logits * target).mean() + 10 * found.penalty.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = net.distribution(u, logits)
    torch.testing.assert_close(found.mean, logits, rtol=0, atol=0.05)
    torch.testing.assert_close(found.trace(), torch.full((6,), 5 * 0.49, dtype=torch.float64), rtol=0.1, atol=0)


@kinds
def test_a_state_is_read_back(kind):
    routers = find_routers(toy_model())
    nets = [trained(kind, router=router, seed=router.index) for router in routers]
    state = router_state(nets)
    assert all(value.device.type == "cpu" and not value.requires_grad for value in state.values())
    others = [kind(router, 1.0) for router in routers]
    load_router_state(others, state)
    u, logits = tokens(router=routers[1])
    for net, other in zip(nets, others, strict=True):
        one, two = (found.distribution(u, logits) for found in (net, other))
        assert torch.equal(one.mean, two.mean)
        assert torch.equal(one.covariance(), two.covariance())
    with pytest.raises(ValueError, match="use the options that they were trained with"):
        load_router_state(others, {name: value for name, value in state.items() if "hidden" not in name})
    with pytest.raises(ValueError, match="the options"):
        load_router_state([kind(router, 1.0, hidden=3) for router in routers], state)


def test_a_scale_that_is_read_back_as_zero_leaves_the_router_as_it_is():
    net, still = MeanFieldLogits(ROUTER, 1.0), MeanFieldLogits(ROUTER, 0.0)
    net.load_state_dict(still.state_dict())
    assert net.is_still
    with pytest.raises(ValueError, match=">= 0"):
        MeanFieldLogits(ROUTER, -1.0)


def test_many_experts_take_the_low_rank_form():
    wide = Router("router", 0, 129, 8, "experts", top_k=2, score="softmax")
    with pytest.raises(ValueError, match="129 experts"):
        FullCovarianceLogits(wide, 1.0)
    u, logits = tokens(router=wide)
    net = FullCovarianceLogits(wide, 0.5, rank=3, dtype=torch.float64)
    assert net.trained(u, logits, draws()).logits.shape == (6, 129)
    with pytest.raises(ValueError, match="at least 1"):
        FullCovarianceLogits(wide, 0.5, rank=0)


def test_routers_of_other_weights_are_refused():
    model = toy_model()
    routers = find_routers(model)
    fingerprint = router_fingerprint(model, routers)
    check_router_weights(model.float().double(), routers, router_fingerprint(model, routers))
    model.layers[1].mixture.router.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="load the checkpoint that they belong to"):
        check_router_weights(model, routers, fingerprint)


def test_no_router_reads_the_global_random_state():
    state = torch.get_rng_state()
    first, second = (MeanFieldLogits(Router("r", index, 5, 12, "e"), 1.0) for index in (0, 1))
    assert not torch.equal(first.hidden, second.hidden)
    assert torch.equal(first.hidden, MeanFieldLogits(ROUTER, 1.0).hidden)
    assert torch.equal(torch.get_rng_state(), state)
