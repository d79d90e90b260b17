"""Experts and shared experts found by the shapes of their layers."""

import pytest
import torch
from oracles.models import toy_model
from oracles.own_models import (
    Holder,
    SharedMixture,
    assert_exact,
    gated,
    linear,
    mixture,
    with_mixtures,
)
from torch import nn

from bmoe_lightning.experts import (
    find_expert_layers,
)


@pytest.mark.parametrize(
    ("expert", "second"),
    [
        (lambda: gated(("w1", "w3", "w2")), "w2"),
        (lambda: gated(("valve", "lift", "fall")), "fall"),
        (lambda: nn.Sequential(linear(6, 10), nn.GELU(), linear(10, 6)), "2"),
        (lambda: nn.Sequential(linear(6, 6), nn.GELU(), linear(6, 6)), "2"),
        (lambda: Holder(inner=nn.Sequential(linear(6, 10), nn.ReLU()), out=linear(10, 6)), "out"),
        (lambda: Holder(fc1=linear(6, 10), fc2=linear(10, 6)), "fc2"),
        (lambda: Holder(down=linear(10, 6), up=linear(6, 10)), "down"),
    ],
)
def test_module_lists_by_structure(expert, second):
    (layer,) = find_expert_layers(mixture([expert() for _ in range(4)], router_name="anything"))
    assert (layer.name, layer.layout, layer.down_proj) == ("block.experts", "modules", second)
    assert (layer.num_experts, layer.d_out) == (4, 6)


def test_two_layers_without_a_router_are_ambiguous():
    """Each of the two leads back to where the other starts, and no router tells the model's width."""
    model = mixture([Holder(fc1=linear(6, 10), fc2=linear(10, 6)) for _ in range(3)], router=False)
    with pytest.raises(ValueError, match=r"do not tell which one is down_proj.*down_proj=, one of \['fc1', 'fc2'\]"):
        find_expert_layers(model, experts="*.experts")
    (layer,) = find_expert_layers(model, experts="*.experts", down_proj="fc2")
    assert (layer.down_proj, layer.d_in, layer.d_out) == ("fc2", 10, 6)


def test_square_experts_are_refused_as_ambiguous():
    model = mixture([gated(("w1", "w3", "w2"), 6, 6) for _ in range(4)])
    with pytest.raises(ValueError, match=r"do not tell which one.*down_proj=, one of \['w1', 'w2', 'w3'\]"):
        find_expert_layers(model)
    (layer,) = find_expert_layers(model, down_proj="w2")
    assert layer.down_proj == "w2"


def test_decoder_layers_and_towers_are_no_experts():
    decoder = Holder(layers=nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(4)), head=linear(8, 12))
    towers = Holder(towers=nn.ModuleList(gated(("up", "gate", "down")) for _ in range(3)), head=linear(6, 12))
    unlike = Holder(
        experts=nn.ModuleList([gated(("up", "gate", "down")), gated(("up", "gate", "down"), 6, 7)]), gate=linear(6, 2)
    )
    one_layer = mixture([linear(6, 6) for _ in range(4)])
    single = mixture([gated(("up", "gate", "down"))])
    for model in (decoder, towers, unlike, one_layer, single):
        with pytest.raises(ValueError, match="has no expert layers"):
            find_expert_layers(model)


def test_shared_experts_are_an_option():
    model = with_mixtures(SharedMixture)
    assert [layer.name for layer in find_expert_layers(model)] == [f"layers.{i}.mixture.workers" for i in range(2)]
    layers = find_expert_layers(model, shared_experts=True)
    assert [(layer.index, layer.name, layer.num_experts, layer.layout) for layer in layers] == [
        (0, "layers.0.mixture.workers", 4, "modules"),
        (1, "layers.0.mixture.shared_expert.fall", 1, "linear"),
        (2, "layers.1.mixture.workers", 4, "modules"),
        (3, "layers.1.mixture.shared_expert.fall", 1, "linear"),
    ]
    assert_exact(model, layers)


class SquareShared(nn.Module):
    def __init__(self, names):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x):
        for layer in self.children():
            x = torch.relu(layer(x))
        return x


def test_square_shared_experts_are_told_by_usual_names():
    class Mixture(SharedMixture):
        names = ("up_proj", "down_proj")

        def __init__(self):
            super().__init__()
            self.shared_expert = SquareShared(self.names)
            self.shared_adapter = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6))  # is none

    class Odd(Mixture):
        names = ("one", "two")

    layers = find_expert_layers(with_mixtures(Mixture), shared_experts=True)
    assert [x.name for x in layers if x.layout == "linear"] == [
        f"layers.{i}.mixture.shared_expert.down_proj" for i in range(2)
    ]
    with pytest.raises(
        ValueError, match=r"\['one', 'two'\] of the shared expert .* do not tell which one is down_proj"
    ):
        find_expert_layers(with_mixtures(Odd), shared_experts=True)


def test_no_shared_experts_to_include():
    with pytest.raises(ValueError, match="ToyMoE has no shared experts beside its 2 expert layers"):
        find_expert_layers(toy_model(), shared_experts=True)
