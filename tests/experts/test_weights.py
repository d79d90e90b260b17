"""The weights of expert layers, and how far they moved."""

import pytest
import torch
from oracles.cases import in_layout, layouts
from oracles.models import as_modules, tiny_qwen, toy_model

from bmoe_lightning.experts import (
    down_proj_parameters,
    find_expert_layers,
    squared_distances,
)


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


@layouts
def test_squared_distances(layout):
    model = in_layout(toy_model(), layout)
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
