"""Plain linear layers, each held against the dense oracle that watches the model's own code."""

import pytest
import torch
from oracles.models import answer_logits, toy_batch, toy_model
from oracles.own_models import (
    BATCHES,
    SharedMixture,
    assert_exact,
    with_mixtures,
)
from torch import nn

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import (
    expert_dropout,
    find_expert_layers,
    find_linear_layers,
)
from bmoe_lightning.laplace import LaplacePosterior


def test_inputs_changed_in_place_are_refused():
    model = toy_model()

    def double(module, inputs, output):
        inputs[0].mul_(2)

    model.layers[1].value.register_forward_hook(double)
    layers = find_linear_layers(model, "*.value")
    with pytest.raises(RuntimeError, match=r"writes in place to the input of down_proj in 'layers.1.value'"):
        collect_factors(model, answer_logits, BATCHES, layers=layers)


def test_layers_called_by_keyword():
    model = toy_model()
    for layer in model.layers:
        own = layer.value
        layer.value = nn.Sequential(own)
        layer.value.forward = lambda x, own=own: own(input=x)
    layers = find_linear_layers(model, "*.value.0")
    assert_exact(model, layers)
    plain = answer_logits(model, BATCHES[0])[0]
    with expert_dropout(model, layers, 0.5, seed=0):
        assert not torch.allclose(answer_logits(model, BATCHES[0])[0], plain)


def test_reduce_asks_where_tokens_lie_otherwise():
    """A layer on `[length, batch]`: the places of its tokens name the wrong examples, which its gradients do not."""
    model = toy_model(num_layers=3)
    for layer in model.layers[:1]:
        own = layer.value
        layer.value = nn.Sequential(own)
        layer.value.forward = lambda x, own=own: own(x.transpose(0, 1).contiguous()).transpose(0, 1)
    batch = toy_batch(num_rows=7, length=7)
    layers = find_linear_layers(model, ["*.value", "*.value.0"])
    plain = toy_model(num_layers=3)
    found = collect_factors(model, answer_logits, [batch], rank=6, approximation="reduce", layers=layers)
    expected = collect_factors(
        plain, answer_logits, [batch], rank=6, approximation="reduce", layers=find_linear_layers(plain, "*.value")
    )
    for layer, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.a_trace, other.a_trace)
        torch.testing.assert_close(layer.g_trace, other.g_trace)


def test_weights_that_are_multiplied_without_their_layer():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.direct = nn.Linear(6, 6)

        def forward(self, x):
            x = self.attention(x, x, x, need_weights=False)[0]
            return x + nn.functional.linear(x, self.direct.weight)

    model = with_mixtures(Attending)
    with pytest.raises(ValueError, match=r"'layers.0.mixture.attention.out_proj' belongs to an nn.MultiheadAttention"):
        find_linear_layers(model, "*.out_proj")
    layers = find_linear_layers(model, ["*.direct", "*.value"])
    with pytest.warns(
        UserWarning, match=r"no token that affects a logit went through layers.0.mixture.direct, layers.1"
    ):
        collect_factors(model, answer_logits, BATCHES, layers=layers)


def test_layers_of_width_one():
    """A reward head, or the gate of a shared expert: torch's kernel for groups cannot take a single column."""
    model = with_mixtures(SharedMixture).float()
    layers = find_linear_layers(model, "*.shared_expert_gate")
    assert [layer.d_out for layer in layers] == [1, 1]
    factors = collect_factors(model, answer_logits, BATCHES, rank=3, layers=layers)
    exact = collect_factors(with_mixtures(SharedMixture), answer_logits, BATCHES, rank=3, layers=layers)
    for layer, other in zip(factors.layers, exact.layers, strict=True):
        torch.testing.assert_close(layer.g_trace, other.g_trace, rtol=1e-4, atol=0)
    LaplacePosterior(factors).predict(model, answer_logits, BATCHES[0])


@pytest.mark.parametrize("pattern", ["*.query", ["*.key", "*.value"], "head"])
def test_plain_linear_layers_by_name(pattern):
    model = toy_model()
    layers = find_linear_layers(model, pattern)
    assert [(x.num_experts, x.d_in, x.layout) for x in layers] == [(1, 6, "linear")] * len(layers)
    assert len(layers) == {"*.query": 2, "head": 1}.get(str(pattern), 4)
    factors = assert_exact(model, layers)
    assert all(float(layer.slots) > 0 for layer in factors.layers)


def test_experts_and_linear_layers_together():
    model = toy_model()
    experts = find_expert_layers(model)
    layers = experts + find_linear_layers(model, "*.value", first_index=len(experts))
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    assert_exact(model, layers)


def test_no_linear_layer_of_that_name():
    with pytest.raises(ValueError, match=r"no linear layer of ToyMoE matches '\*.nothing'; there are \d+, such as lay"):
        find_linear_layers(toy_model(), "*.nothing")
