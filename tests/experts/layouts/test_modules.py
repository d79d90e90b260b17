"""Experts that are modules of their own, each held against the dense oracle that watches the model's own code."""

import pytest
import torch
from oracles.models import answer_logits
from oracles.own_models import (
    BATCHES,
    DroppingMixture,
    EverybodyMixture,
    Expert,
    ExpertChoiceMixture,
    OwnMixture,
    TwiceMixture,
    assert_exact,
    with_mixtures,
)
from torch import nn

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import (
    find_expert_layers,
)
from bmoe_lightning.laplace import LaplacePosterior


@pytest.mark.parametrize("kind", [OwnMixture, DroppingMixture, EverybodyMixture, TwiceMixture])
def test_own_lists_of_experts(kind):
    model = with_mixtures(kind)
    layers = find_expert_layers(model)
    assert [(layer.name, layer.down_proj, layer.d_in) for layer in layers] == [
        ("layers.0.mixture.workers", "land", 5),
        ("layers.1.mixture.workers", "land", 5),
    ]
    assert_exact(model, layers)


def test_experts_that_choose_their_tokens():
    """Such a router mixes examples: which tokens an expert takes depends on the others, but not differentiably so."""
    model = with_mixtures(ExpertChoiceMixture)
    assert_exact(model, find_expert_layers(model))


def test_a_dictionary_of_experts_beside_a_dropout():
    class Named(OwnMixture):
        def __init__(self):
            super().__init__()
            workers = {f"expert_{i}": Expert() for i in range(4)}
            self.workers = nn.ModuleDict({**workers, "dropout": nn.Dropout(0.5)})

        def forward(self, x):
            tokens = x.reshape(-1, x.shape[-1])
            weights = self.weights(tokens)[:, :4]
            outputs = [self.workers["dropout"](self.workers[f"expert_{i}"](tokens)) for i in range(4)]
            return (torch.stack(outputs, 1) * weights.unsqueeze(2)).sum(1).view_as(x)

    model = with_mixtures(Named)
    layers = find_expert_layers(model)
    assert [(layer.num_experts, layer.down_proj) for layer in layers] == [(4, "land")] * 2
    assert_exact(model, layers)


class InPlace(OwnMixture):
    """What comes out of an expert is changed in place."""

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights = self.weights(tokens)
        total = torch.zeros_like(tokens)
        for number, worker in enumerate(self.workers):
            rows = weights[:, number].nonzero().squeeze(1)
            output = worker(tokens[rows])
            output.mul_(weights[rows, number].unsqueeze(1))
            total = total.index_add(0, rows, output)
        return total.view_as(x)


def test_outputs_changed_in_place():
    model = with_mixtures(InPlace)
    expected = with_mixtures(OwnMixture)
    layers = find_expert_layers(model)
    found = collect_factors(model, answer_logits, BATCHES, rank=20)
    for layer, other in zip(found.layers, assert_exact(expected, find_expert_layers(expected)).layers, strict=True):
        torch.testing.assert_close(layer.g_trace, other.g_trace, rtol=1e-10, atol=1e-12)
    covariance = LaplacePosterior(found).logit_covariance(model, answer_logits, BATCHES[0])[1]
    plain = LaplacePosterior(collect_factors(expected, answer_logits, BATCHES, rank=20))
    torch.testing.assert_close(covariance, plain.logit_covariance(expected, answer_logits, BATCHES[0])[1])
    assert len(layers) == 2


def test_experts_with_gate_and_up_in_one_layer():
    class FusedGate(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = nn.Linear(6, 10)
            self.out = nn.Linear(5, 6)

        def forward(self, x):
            gate, up = self.both(x).chunk(2, -1)
            return self.out(torch.sigmoid(gate) * up)

    class Mixture(OwnMixture):
        def __init__(self):
            super().__init__()
            self.workers = nn.ModuleList(FusedGate() for _ in range(4))

    model = with_mixtures(Mixture)
    layers = find_expert_layers(model)
    assert [(layer.down_proj, layer.d_in, layer.d_out) for layer in layers] == [("out", 5, 6)] * 2
    assert_exact(model, layers)
