"""Expert layers are found, named by the user, and located again in other models."""

import pytest
from oracles.cases import in_layout, layouts
from oracles.models import as_modules, tiny_qwen, toy_model
from oracles.own_models import Holder, gated, linear, mixture
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from bmoe_lightning.experts import (
    ExpertLayer,
    find_expert_layers,
)
from bmoe_lightning.experts.discovery import locate_expert_layers


def test_fused_experts_of_transformers():
    layers = find_expert_layers(tiny_qwen(num_hidden_layers=3))
    assert [layer.name for layer in layers] == [f"model.layers.{i}.mlp.experts" for i in range(3)]
    assert layers[1] == ExpertLayer("model.layers.1.mlp.experts", 1, 4, 12, 16, "fused", "down_proj", False)


def test_dense_layers_of_a_mixed_model_are_left_out():
    layers = find_expert_layers(tiny_qwen(num_hidden_layers=3, mlp_only_layers=[1]))
    assert [(layer.name, layer.index) for layer in layers] == [
        ("model.layers.0.mlp.experts", 0),
        ("model.layers.2.mlp.experts", 1),
    ]


def test_transposed_fused_weights():

    config = GptOssConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    (layer,) = find_expert_layers(GptOssForCausalLM(config))
    assert (layer.num_experts, layer.d_in, layer.d_out, layer.transposed) == (3, 12, 16, True)


def test_named_by_user():
    model = mixture([gated(("a", "b", "c")) for _ in range(4)], router=False)
    with pytest.raises(ValueError, match="no expert layers"):
        find_expert_layers(model)
    (layer,) = find_expert_layers(model, experts="*.experts")
    assert (layer.name, layer.down_proj) == ("block.experts", "c")
    (layer,) = find_expert_layers(model, experts="block.experts", down_proj="a")
    assert (layer.down_proj, layer.d_in, layer.d_out) == ("a", 6, 10)
    with pytest.raises(ValueError, match=r"'block.experts' have no linear layer 'w2'; they have \['a', 'b', 'c'\]"):
        find_expert_layers(model, experts="*.experts", down_proj="w2")
    with pytest.raises(ValueError, match=r"no expert layers matching '\*.nothing'"):
        find_expert_layers(model, experts="*.nothing")


def test_pattern_restricts_fused_layers():
    (layer,) = find_expert_layers(tiny_qwen(num_hidden_layers=2), experts="*.1.mlp.experts")
    assert layer.name == "model.layers.1.mlp.experts"


def test_message_names_what_is_there():
    model = Holder(towers=nn.ModuleList(gated(("up", "gate", "down")) for _ in range(3)))
    with pytest.raises(ValueError, match=r"Holder has no expert layers.*Lists of modules in this model: \['towers'\]"):
        find_expert_layers(model)
    with pytest.raises(ValueError, match="in this model: none"):
        find_expert_layers(linear(3, 3))


@layouts
def test_layers_are_located_under_another_prefix(layout):
    model = in_layout(toy_model(), layout)
    layers = find_expert_layers(model)
    assert locate_expert_layers(model, layers) == layers
    held = Holder(outer=Holder(model=model))
    inside = locate_expert_layers(held, layers)
    assert [x.name for x in inside] == [f"outer.model.layers.{i}.mixture.crew" for i in range(2)]
    assert inside == find_expert_layers(held)
    assert locate_expert_layers(model, inside) == layers
    assert locate_expert_layers(model, layers[1:]) == layers[1:]


def test_layers_that_cannot_be_located():
    model = toy_model()
    layers = find_expert_layers(model)
    with pytest.raises(ValueError, match=r"ToyMoE has no expert layers called 'layers.1.mixture.crew'"):
        locate_expert_layers(toy_model(num_layers=1), layers)
    with pytest.raises(ValueError, match=r"has several .*: a.layers.0.mixture.crew, b.layers.0.mixture.crew"):
        locate_expert_layers(Holder(a=model, b=toy_model(seed=1)), layers)
    with pytest.raises(ValueError, match=r"does not hold experts as 'layers.0.mixture.crew' did"):
        locate_expert_layers(as_modules(model), layers)
    with pytest.raises(ValueError, match="down_proj 'fall'"):
        locate_expert_layers(model, find_expert_layers(as_modules(model)))


def test_located_layers_have_the_sizes_of_their_model():
    (first, _) = locate_expert_layers(toy_model(width=8, num_experts=3), find_expert_layers(toy_model()))
    assert (first.num_experts, first.d_in, first.d_out) == (3, 5, 8)


class TestLocatingRenamedLayers:
    def test_under_another_attribute(self):
        fitted, served = (
            nn.ModuleDict({"model": toy_model()}),
            nn.ModuleDict({"net": nn.ModuleDict({"x": toy_model()})}),
        )
        layers = find_expert_layers(fitted)
        assert [layer.name for layer in locate_expert_layers(served, layers)] == [
            f"net.x.layers.{i}.mixture.crew" for i in range(len(layers))
        ]
        assert [layer.name for layer in locate_expert_layers(served["net"]["x"], layers)] == [
            f"layers.{i}.mixture.crew" for i in range(len(layers))
        ]

    def test_another_index_is_another_layer(self):
        second = find_expert_layers(toy_model())[1:]
        with pytest.raises(ValueError, match=r"no expert layers called 'layers.1.mixture.crew'.* are: layers.0"):
            locate_expert_layers(toy_model(num_layers=1), second)

    def test_several_places_are_named(self):
        two = nn.ModuleDict({"a": toy_model(), "b": toy_model()})
        layers = find_expert_layers(nn.ModuleDict({"model": toy_model()}))
        with pytest.raises(ValueError, match=r"several expert layers .*: a.layers.0.mixture.crew, b.layers.0"):
            locate_expert_layers(two, layers)
