"""Models as users write them, and the comparison of factors and covariance with the dense oracle on any model."""

from __future__ import annotations

import torch
from torch import nn

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import register_experts
from bmoe_lightning.laplace import LaplacePosterior
from oracles.models import Specialist, answer_logits, toy_batch, toy_model
from recipes.supported_models.oracle import dense_factors, dense_logit_covariance, observe
from recipes.supported_models.watch import down_proj_weights

BATCHES = [toy_batch(num_rows=4, seed=1), toy_batch(num_rows=3, seed=2)]


def assert_exact(model, layers, batches=BATCHES, class_logits=answer_logits):
    """Factors and logit covariance are those of the oracle, to rounding; returns the factors."""
    weights = [down_proj_weights(model, layer) for layer in layers]
    seen = [observe(model, class_logits, batch, weights) for batch in batches]
    dense = dense_factors(seen, weights)
    factors = collect_factors(model, class_logits, batches, rank=20, sketch="exact", layers=layers)
    for layer, expected in zip(factors.layers, dense, strict=True):
        torch.testing.assert_close(layer.slots, expected.slots, rtol=0, atol=0)
        for basis, eigenvalues, factor in (
            (layer.a_basis, layer.a_eigenvalues, expected.a),
            (layer.g_basis, layer.g_eigenvalues, expected.g),
        ):
            torch.testing.assert_close((basis * eigenvalues.unsqueeze(1)) @ basis.mT, factor, rtol=1e-9, atol=1e-11)
    posterior = LaplacePosterior(factors, prior_precision=0.7)
    for batch, observation in zip(batches, seen, strict=True):
        logits, covariance = posterior.logit_covariance(model, class_logits, batch)
        torch.testing.assert_close(logits, observation.logits, rtol=1e-11, atol=1e-12)
        expected = dense_logit_covariance(observation.jacobians, dense, 0.7)
        torch.testing.assert_close(covariance, expected, rtol=1e-8, atol=1e-10)
    return factors


def linear(d_in, d_out):
    return nn.Linear(d_in, d_out, bias=False)


class Holder(nn.Module):
    """A module from keyword arguments."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def gated(names, width=6, inner=10):
    first, gate, second = names
    return Holder(**{first: linear(width, inner), gate: linear(width, inner), second: linear(inner, width)})


def mixture(experts, router=True, router_name="gate"):
    children = {"experts": nn.ModuleList(experts)}
    if router:
        children[router_name] = linear(6, len(experts))
    return Holder(block=Holder(**children))


def with_mixtures(make, num_layers=2, seed=0):
    """A `ToyMoE` in float64 whose mixtures are of another kind."""
    model = toy_model(seed, num_layers=num_layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in model.layers:
            layer.mixture = make().double()
    return model.eval()


class Expert(nn.Module):
    """An expert with names and biases of its own."""

    def __init__(self, width=6, inner=5):
        super().__init__()
        self.rise = nn.Linear(width, inner)
        self.land = nn.Linear(inner, width)

    def forward(self, x):
        return self.land(torch.relu(self.rise(x)))


class Chooser(nn.Module):
    """A router of four experts that makes its logits without `torch.nn.functional.linear`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return x @ self.weight.T


class OwnMixture(nn.Module):
    """Top-2 routing over a list of experts; the subclasses route otherwise."""

    def __init__(self, num_experts=4):
        super().__init__()
        self.chooser = nn.Linear(6, num_experts)
        self.workers = nn.ModuleList(Expert() for _ in range(num_experts))

    def weights(self, x):
        """Routing weights `[T, E]`, zero for an expert that does not see the token."""
        values, index = self.chooser(x).softmax(-1).topk(2, dim=-1)
        return torch.zeros(len(x), len(self.workers), dtype=x.dtype).scatter(1, index, values)

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights = self.weights(tokens)
        total = torch.zeros_like(tokens)
        for number, worker in enumerate(self.workers):
            rows = weights[:, number].nonzero().squeeze(1)
            total = total.index_add(0, rows, worker(tokens[rows]) * weights[rows, number].unsqueeze(1))
        return total.view_as(x)


class DroppingMixture(OwnMixture):
    """Experts take three tokens each and drop what comes later."""

    def weights(self, x):
        weights = super().weights(x)
        return weights * ((weights != 0).cumsum(0) <= 3)


class ExpertChoiceMixture(OwnMixture):
    """Every expert chooses the tokens that it likes best."""

    def weights(self, x):
        scores = self.chooser(x).sigmoid()
        chosen = scores.topk(5, dim=0).indices
        return torch.zeros_like(scores).scatter(0, chosen, scores.gather(0, chosen))


class EverybodyMixture(OwnMixture):
    """No routing at all: every expert sees every token."""

    def weights(self, x):
        return self.chooser(x).softmax(-1)


class TwiceMixture(OwnMixture):
    """The same experts, called twice in one forward."""

    def forward(self, x):
        return super().forward(torch.tanh(super().forward(x)) + x)


class Square(OwnMixture):
    def __init__(self):
        super().__init__()
        self.workers = nn.ModuleList(Expert(6, 6) for _ in range(4))


class SharedMixture(OwnMixture):
    def __init__(self):
        super().__init__()
        self.shared_expert = Specialist(toy_model().config)
        self.shared_expert_gate = nn.Linear(6, 1)

    def forward(self, x):
        return super().forward(x) + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)


class Buffers(nn.Module):
    """All experts in two parameters, tokens in buffers of a fixed capacity; what does not fit is dropped."""

    def __init__(self, num_experts=4, width=6, inner=5, capacity=6):
        super().__init__()
        self.capacity = capacity
        self.router = nn.Linear(width, num_experts, bias=False)
        self.first = nn.Parameter(torch.randn(num_experts, width, inner) * 0.6)
        self.second = nn.Parameter(torch.randn(num_experts, inner, width) * 0.6)
        self.second_bias = nn.Parameter(torch.randn(num_experts, 1, width))

    def dispatch(self, x):
        weights, index = self.router(x).softmax(-1).max(dim=-1)
        hits = nn.functional.one_hot(index, len(self.first))
        place = (hits.cumsum(0) * hits).sum(-1) - 1
        buffers = nn.functional.one_hot(place, len(x))[:, : self.capacity].to(x.dtype)
        return hits.to(x.dtype).unsqueeze(2) * buffers.unsqueeze(1), weights  # [T, E, C], [T]

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        places, weights = self.dispatch(tokens)
        buffers = (places.flatten(1).T @ tokens).view(len(self.first), self.capacity, -1)
        hidden = torch.relu(torch.bmm(buffers, self.first))
        outputs = torch.bmm(hidden, self.second) + self.second_bias
        return ((places.flatten(1) @ outputs.flatten(0, 1)) * weights.unsqueeze(1)).view_as(x)


class MoreBuffers(Buffers):
    pass


@register_experts(Buffers, down_proj="second", transposed=True, expert_parameters=("first", "second", "second_bias"))
def buffers_forward(self, down_proj, x):
    tokens = x.reshape(-1, x.shape[-1])
    places, weights = self.dispatch(tokens)
    buffers = (places.flatten(1).T @ tokens).view(len(self.first), self.capacity, -1)
    hidden = torch.relu(torch.bmm(buffers, self.first))
    experts = torch.arange(len(self.first)).repeat_interleave(self.capacity)
    outputs = down_proj(hidden.flatten(0, 1), experts).view(*hidden.shape[:2], -1) + self.second_bias
    return ((places.flatten(1) @ outputs.flatten(0, 1)) * weights.unsqueeze(1)).view_as(x)
