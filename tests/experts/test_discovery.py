import pytest
import torch
from oracles.models import as_modules, tiny_qwen, toy_model
from torch import nn

from bmoe_lightning.experts import ExpertLayer, down_proj_parameters, find_expert_layers, squared_distances
from bmoe_lightning.experts.discovery import locate_expert_layers


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
    from transformers import GptOssConfig, GptOssForCausalLM

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
    with pytest.raises(ValueError, match=r"do not tell which one comes second.*down_proj=one of \['fc1', 'fc2'\]"):
        find_expert_layers(model, experts="*.experts")
    (layer,) = find_expert_layers(model, experts="*.experts", down_proj="fc2")
    assert (layer.down_proj, layer.d_in, layer.d_out) == ("fc2", 10, 6)


def test_square_experts_are_refused_as_ambiguous():
    model = mixture([gated(("w1", "w3", "w2"), 6, 6) for _ in range(4)])
    with pytest.raises(ValueError, match=r"do not tell which one.*down_proj=one of \['w1', 'w2', 'w3'\]"):
        find_expert_layers(model)
    (layer,) = find_expert_layers(model, down_proj="w2")
    assert layer.down_proj == "w2"


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


def test_message_names_what_is_there():
    model = Holder(towers=nn.ModuleList(gated(("up", "gate", "down")) for _ in range(3)))
    with pytest.raises(ValueError, match=r"Holder has no expert layers.*Lists of modules in this model: \['towers'\]"):
        find_expert_layers(model)
    with pytest.raises(ValueError, match="in this model: none"):
        find_expert_layers(linear(3, 3))


@pytest.mark.parametrize("layout", ["fused", "modules"])
def test_layers_are_located_under_another_prefix(layout):
    model = toy_model() if layout == "fused" else as_modules(toy_model())
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
    with pytest.raises(ValueError, match="second linear layer 'fall'"):
        locate_expert_layers(model, find_expert_layers(as_modules(model)))


def test_located_layers_have_the_sizes_of_their_model():
    (first, _) = locate_expert_layers(toy_model(width=8, num_experts=3), find_expert_layers(toy_model()))
    assert (first.num_experts, first.d_in, first.d_out) == (3, 5, 8)


def test_parameters_of_both_layouts():
    fused = toy_model()
    (first, _) = find_expert_layers(fused)
    parameters = down_proj_parameters(fused, first)
    assert list(parameters) == ["layers.0.mixture.crew.down_proj"]
    modules = as_modules(fused)
    (first, _) = find_expert_layers(modules)
    copies = down_proj_parameters(modules, first)
    assert list(copies) == [f"layers.0.mixture.crew.{e}.fall.weight" for e in range(4)]
    assert torch.equal(torch.stack(list(copies.values())), parameters["layers.0.mixture.crew.down_proj"])


@pytest.mark.parametrize("layout", ["fused", "modules"])
def test_squared_distances(layout):
    model = toy_model() if layout == "fused" else as_modules(toy_model())
    layers = find_expert_layers(model)
    reference = {n: p.detach().clone() for layer in layers for n, p in down_proj_parameters(model, layer).items()}
    assert all(bool((d == 0).all()) for d in squared_distances(model, layers, reference))

    zero = squared_distances(model, layers, None)
    blocks = [torch.cat([w.reshape(-1, 6, 5) for w in down_proj_parameters(model, x).values()]) for x in layers]
    for distances, block in zip(zero, blocks, strict=True):
        assert distances.dtype == torch.float64
        torch.testing.assert_close(distances, block.detach().square().sum((1, 2)), rtol=1e-12, atol=0)

    with torch.no_grad():
        for parameter in down_proj_parameters(model, layers[1]).values():
            parameter.view(-1, 30)[-1, 0] += 0.5  # one entry of the last expert, or of every expert module
    moved = squared_distances(model, layers, {name: value.float() for name, value in reference.items()})
    expected = torch.tensor([0, 0, 0, 0.25] if layout == "fused" else [0.25] * 4, dtype=torch.float64)
    torch.testing.assert_close(moved[1], expected, rtol=1e-6, atol=1e-10)
    assert float(moved[0].max()) < 1e-10

    with pytest.raises(KeyError):
        squared_distances(model, layers, {})


def test_squared_distances_of_narrow_weights_are_summed_in_float64():
    model = tiny_qwen(dtype=torch.bfloat16, num_hidden_layers=1)
    layers = find_expert_layers(model)
    (parameter,) = down_proj_parameters(model, layers[0]).values()
    with torch.no_grad():
        parameter.fill_(0.5)
    expected = torch.full((4,), 0.25 * 12 * 16, dtype=torch.float64)
    torch.testing.assert_close(squared_distances(model, layers, None)[0], expected, rtol=1e-14, atol=0)
