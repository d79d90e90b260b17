import pytest
import torch
from oracles.cases import in_layout, layouts
from oracles.models import tiny_qwen, toy_model
from torch import nn

from bmoe_lightning.experts import ExpertLayer, find_expert_layers, weight_fingerprint
from bmoe_lightning.experts.fingerprint import module_fingerprint, sample


def fingerprint(model):
    return weight_fingerprint(model, find_expert_layers(model))


def test_same_weights_same_fingerprint():
    model, twin, other = toy_model(seed=1), toy_model(seed=1), toy_model(seed=2)
    assert fingerprint(model) == fingerprint(twin) != fingerprint(other)
    assert len(fingerprint(model)) == 64


@layouts
@pytest.mark.parametrize("part", ["second", "first", "router"])
def test_every_matrix_of_every_expert_counts(layout, part):
    model = in_layout(toy_model(), layout)
    before = fingerprint(model)
    mixture = model.layers[1].mixture
    if part == "router":
        weights = [mixture.router.weight]
    elif layout == "fused":
        weights = list(mixture.crew.down_proj if part == "second" else mixture.crew.gate_up_proj)
    else:
        weights = [(expert.fall if part == "second" else expert.valve).weight for expert in mixture.crew]
    for weight in weights:
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.001)
        assert fingerprint(model) != before
        with torch.no_grad():
            weight.copy_(kept)
        assert fingerprint(model) == before


def test_every_one_of_many_experts_counts():
    """More experts than there are samples of a matrix."""
    model = toy_model(num_experts=100, width=8, inner=9, num_layers=1)
    weights = model.layers[0].mixture.crew.down_proj
    before, seen = fingerprint(model), set()
    for expert in range(100):
        with torch.no_grad():
            weights[expert] *= 1.001
        seen.add(fingerprint(model))
    assert len(seen | {before}) == 101


def test_a_step_of_training_changes_large_matrices():
    """Only a sample of a large matrix is read; an optimiser moves all of it."""
    model = tiny_qwen(dtype=torch.float32, hidden_size=64, moe_intermediate_size=48)
    before = fingerprint(model)
    weights = [layer.mlp.experts.down_proj for layer in model.model.layers]
    optimiser = torch.optim.AdamW(weights, lr=1e-5)
    model(input_ids=torch.arange(1, 29).view(1, -1)).logits.sum().backward()
    optimiser.step()
    assert fingerprint(model) != before


def test_wrapping_and_widening_do_not_matter_but_rounding_does():
    model = tiny_qwen(dtype=torch.float32)
    before = fingerprint(model)
    assert fingerprint(nn.ModuleDict({"net": model})) == before
    assert fingerprint(tiny_qwen(dtype=torch.float32).double()) == before
    assert fingerprint(tiny_qwen(dtype=torch.float32).bfloat16()) != before


@pytest.mark.parametrize("width", [64, 1408, 2048])
def test_every_column_is_looked_at(width):
    model = torch.nn.Module()
    model.block = torch.nn.Module()
    model.block.experts = torch.nn.Module()
    model.block.experts.down_proj = torch.nn.Parameter(torch.randn(2, 96, width))
    layers = [ExpertLayer("block.experts", 0, 2, width, 96, "fused", "down_proj")]
    before = weight_fingerprint(model, layers)
    with torch.no_grad():
        model.block.experts.down_proj[:, :, 1:] *= 2
    assert weight_fingerprint(model, layers) != before


def test_the_rest_of_a_transformers_model_counts():
    model = tiny_qwen()
    layers = find_expert_layers(model)
    before = weight_fingerprint(model, layers)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    assert weight_fingerprint(model, layers) != before


@pytest.mark.parametrize("name", ["head.weight", "words.weight", "layers.0.query.weight"])
def test_all_that_an_own_model_computes_with_counts(name):
    model = toy_model()
    before = fingerprint(model)
    with torch.no_grad():
        model.get_parameter(name).mul_(3)
    assert fingerprint(model) != before


@pytest.mark.parametrize("row", [0, 65, 129])
def test_every_row_of_a_large_matrix_counts(row):
    model = nn.Linear(3, 130, bias=False)
    before = sample(model.weight, sharded=False)
    assert len(before) == 130
    with torch.no_grad():
        model.weight[row] += 0.5
    assert (sample(model.weight, sharded=False) != before).nonzero().flatten().tolist() == [row]


def test_that_of_a_module_covers_all_its_parts():
    """Another model beside the one with the experts, which may be the one that is trained."""
    first, second, teacher = toy_model(), toy_model(), toy_model(seed=1)
    one, other = nn.ModuleList([teacher, first]), nn.ModuleList([teacher, second])
    assert module_fingerprint(one) == module_fingerprint(other)
    with torch.no_grad():
        list(second.parameters())[-1].add_(1)
    assert module_fingerprint(one) != module_fingerprint(other)
