"""Passes with Bayesian routers: routes, averages of scores against quadrature, signals, and the limit of no noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles.models import answer_logits, tiny_qwen, toy_batch, toy_model

from bmoe_lightning.routers import (
    FixedNoise,
    FullCovarianceLogits,
    MeanFieldLogits,
    PositionNoise,
    Router,
    TokenRows,
    averaged_scores,
    find_routers,
    intercepted_routers,
    mean_routers,
    prediction,
    probe_routers,
    recorded_signals,
    sampled_routes,
    watched_tokens,
)

BATCH = toy_batch(num_rows=4)


def logits_of(model, context=None):
    with torch.no_grad():
        if context is None:
            return answer_logits(model, BATCH)[0]
        with context:
            return answer_logits(model, BATCH)[0]


def fixed(routers, *scales):
    return [FixedNoise(router, scale) for router, scale in zip(routers, scales, strict=True)]


def probed(model):
    return probe_routers(model, find_routers(model), lambda: answer_logits(model, BATCH)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_noise_the_model_is_bitwise_the_same(dtype):
    model = toy_model().to(dtype)
    routers, noise = find_routers(model), PositionNoise(0)
    assert torch.equal(logits_of(model, sampled_routes(model, fixed(routers, 0.0, 0.0), [0], noise)), logits_of(model))
    assert torch.equal(logits_of(model, averaged_scores(model, fixed(routers, 0.0, 0.0), 4, noise)), logits_of(model))


def test_a_route_is_the_model_with_the_noise_of_its_sample():
    model = toy_model()
    routers, noise = find_routers(model), PositionNoise(3)
    for sample in (0, 1):

        def added(router, _u, logits, sample=sample):
            rows = watch.rows(len(logits))
            return logits + (0.5, 2.0)[router.index] * noise.at(rows, router, [sample]).flatten(0, 2).to(logits)

        with watched_tokens(model) as watch:
            expected = logits_of(model, intercepted_routers(model, routers, added))
        found = logits_of(model, sampled_routes(model, fixed(routers, 0.5, 2.0), [sample], noise))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(found, logits_of(model))


def test_noise_that_was_drawn_for_fewer_positions_is_that_of_more():
    router = Router("router", 0, 3, 2, "experts")
    noise = PositionNoise(1)
    short, long = (TokenRows.of_mask(torch.ones(2, length)) for length in (3, 5))
    one = noise.at(short, router, [0, 1])
    other = noise.at(long, router, [0, 1])
    assert torch.equal(one, other[:, :, :3])
    assert torch.equal(other[0], -other[1])
    copies = TokenRows.of_mask(torch.ones(4, 5))
    assert torch.equal(noise.of_copies(copies, router, [0, 1]), other.flatten(0, 1))
    with pytest.raises(RuntimeError, match="4 rows, which are no 3 copies"):
        noise.of_copies(copies, router, [0, 1, 2])


def quadrature(logits, sigma):
    """The mean softmax `[N]` of three logits under independent Gaussian noise, by Gauss-Hermite quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(40)
    grid = torch.from_numpy(np.stack(np.meshgrid(points, points, points, indexing="ij"), -1)).reshape(-1, 3)
    weight = torch.from_numpy(np.einsum("i,j,k->ijk", weights, weights, weights)).flatten()
    return ((logits + sigma * grid).softmax(-1) * weight.unsqueeze(1)).sum(0) / weight.sum()


class Seen:
    """The scores that averaged logits give, for one token at many positions."""

    def __init__(self, top_k, antithetic=False):
        self.model = toy_model(num_experts=3, top_k=top_k, num_layers=1)
        (self.router,) = probed(self.model)
        self.antithetic = antithetic

    def scores(self, num_samples, seed, sigma=1.0, tokens=8):
        fixed, seen = torch.tensor([0.9, 0.1, -0.6], dtype=torch.float64), []
        ids = torch.ones(1, tokens, dtype=torch.int64)

        def constant(_router, _u, logits):
            return fixed.expand_as(logits).contiguous()

        def look(_router, _u, logits):
            seen.append(logits.softmax(-1))
            return logits

        noise = PositionNoise(seed, antithetic=self.antithetic)
        with (
            torch.no_grad(),
            intercepted_routers(self.model, [self.router], constant),
            averaged_scores(self.model, [FixedNoise(self.router, sigma)], num_samples, noise),
            intercepted_routers(self.model, [self.router], look),
        ):
            self.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return fixed, seen[0]


@pytest.mark.parametrize("top_k", [1, 2])
def test_averaged_scores_against_quadrature(top_k):
    case = Seen(top_k)
    errors = []
    for num_samples in (16, 256):
        fixed, _ = case.scores(1, 0)
        expected = quadrature(fixed, 1.0)
        found = torch.cat([case.scores(num_samples, seed)[1] for seed in range(12)])
        errors.append(float((found - expected).square().mean().sqrt()))
    slope = math.log(errors[1] / errors[0]) / math.log(16)
    assert -0.6 < slope < -0.4
    torch.testing.assert_close(found.mean(0), expected, rtol=0, atol=0.01)
    # The order of the experts, and so the chosen ones, is that of the logits.
    assert (found.argsort(-1, descending=True) == torch.arange(3)).all()


def test_antithetic_pairs_have_less_variance():
    variances = []
    for antithetic in (False, True):
        case = Seen(2, antithetic)
        found = torch.cat([case.scores(16, seed)[1] for seed in range(20)])
        variances.append(float(found.var(0).sum()))
    assert variances[1] <= 0.6 * variances[0]


def test_scores_of_no_known_kind_have_no_average():
    model = toy_model()
    routers = find_routers(model)  # not probed
    with pytest.raises(ValueError, match="'other'"):
        logits_of(model, averaged_scores(model, fixed(routers, 1.0, 1.0), 2, PositionNoise(0)))


def random_nets(model, kind=MeanFieldLogits, **options):
    """Nets that shift the mean, and whose scale depends on the token."""
    nets = [kind(router, 0.8, dtype=torch.float64, **options) for router in probed(model)]
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for net in nets for p in net.parameters()):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return nets


@pytest.mark.parametrize("kind", [MeanFieldLogits, FullCovarianceLogits])
def test_rows_get_the_same_logits_alone_padded_and_in_copies(kind):
    model = toy_model()
    nets, noise = random_nets(model, kind), PositionNoise(1)
    state = torch.get_rng_state()
    found = torch.stack([logits_of(model, sampled_routes(model, nets, [s], noise)) for s in range(3)])
    copies = {name: values.repeat(3, *[1] * (values.dim() - 1)) for name, values in BATCH.items()}
    with torch.no_grad(), sampled_routes(model, nets, [0, 1, 2], noise):
        together = answer_logits(model, copies)[0]
    torch.testing.assert_close(together.view_as(found), found, rtol=0, atol=1e-9)
    padded = {name: torch.nn.functional.pad(BATCH[name], (3, 0)) for name in ("ids", "mask")}
    with torch.no_grad(), sampled_routes(model, nets, [0], noise):
        torch.testing.assert_close(answer_logits(model, padded)[0], found[0], rtol=0, atol=1e-9)
    with torch.no_grad(), averaged_scores(model, nets, 6, noise):
        scores = answer_logits(model, padded)[0]
    torch.testing.assert_close(logits_of(model, averaged_scores(model, nets, 6, noise)), scores, rtol=0, atol=1e-9)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_the_size_of_chunks_of_samples_changes_nothing(monkeypatch):
    model = toy_model()
    nets, noise = random_nets(model), PositionNoise(1)
    expected = logits_of(model, averaged_scores(model, nets, 7, noise))
    whole = prediction.sample_chunks
    for limit in (1, 3 * 28 * 4):
        monkeypatch.setattr(prediction, "sample_chunks", lambda *given, limit=limit: whole(*given, limit=limit))
        found = logits_of(model, averaged_scores(model, nets, 7, noise))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_signals_are_those_of_the_last_real_token():
    model = toy_model()
    nets, seen = random_nets(model), {}

    def keep(router, u, logits):
        seen[router.index] = u.clone(), logits.clone()
        return logits

    with recorded_signals(model, nets) as signals, mean_routers(model, nets):
        mean = logits_of(model)
    with mean_routers(model, nets[:1]):
        logits_of(model, intercepted_routers(model, [nets[1].router], keep))
    last = torch.arange(4) * 7 + 6  # padding is on the left
    u, logits = (values[last] for values in seen[1])
    expected = nets[1].distribution(u, logits).covariance()
    centring = torch.eye(4, dtype=torch.float64) - 0.25
    torch.testing.assert_close(
        signals.variances[1][0], (centring @ expected @ centring).diagonal(dim1=-2, dim2=-1).sum(-1), rtol=1e-9, atol=0
    )
    probabilities = nets[1].mean(u, logits).softmax(-1)
    torch.testing.assert_close(
        signals.entropies[1][0], -(probabilities * probabilities.log()).sum(-1), rtol=1e-9, atol=0
    )
    assert not torch.allclose(mean, logits_of(model))


def test_rows_that_choices_share_have_no_signals():
    model = tiny_qwen()
    nets = [FixedNoise(router, 0.5) for router in find_routers(model)]
    length = 5
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    sees[4, 3] = False  # two choices of one token each after three of a prompt
    mask = torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(~sees, torch.finfo(torch.float64).min)
    inputs = {"input_ids": torch.ones(1, length, dtype=torch.int64), "position_ids": torch.tensor([[0, 1, 2, 3, 3]])}
    for attention, count in ((mask, 0), (torch.ones(1, length, dtype=torch.int64), 1)):
        with torch.no_grad(), recorded_signals(model, nets) as signals:
            model(**inputs, attention_mask=attention)
        assert [len(signals.entropies.get(net.router.index, ())) for net in nets] == [count] * len(nets)
