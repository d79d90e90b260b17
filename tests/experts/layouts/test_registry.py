"""A layout is one file and one entry: nothing else knows a layout by name."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from oracles.cases import in_layout
from oracles.models import answer_logits, toy_batch, toy_model
from torch import nn

import bmoe_lightning.experts
from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.experts import find_expert_layers, tapped_batch
from bmoe_lightning.experts.discovery import locate_expert_layers
from bmoe_lightning.experts.grouped_matmul import ExpertGroups
from bmoe_lightning.experts.layouts.intercept import attached_state, combine, down_proj_product
from bmoe_lightning.experts.layouts.registry import LAYOUTS, PLAIN_LINEAR
from bmoe_lightning.experts.types import ExpertLayer, Layout
from bmoe_lightning.laplace import LaplacePosterior


def test_names_are_those_of_the_layouts():
    assert {name: layout.name for name, layout in LAYOUTS.items()} == {name: name for name in LAYOUTS}
    assert PLAIN_LINEAR in LAYOUTS.values()
    assert all(layout.description for layout in LAYOUTS.values())


def test_detected_layers_name_their_layout():
    for kind in ("fused", "modules"):
        assert {layer.layout for layer in find_expert_layers(in_layout(toy_model(), kind))} == {kind}


def test_no_other_file_names_a_layout():
    folder = Path(bmoe_lightning.experts.__file__).parent
    files = [path for path in folder.parent.rglob("*.py") if path.parent != folder / "layouts"]
    names = re.compile(rf"""layout\w*\s*(==|!=|in)\s*[\[\(\{{]?\s*["']({"|".join(LAYOUTS)})["']""")
    assert len(files) > 50
    assert not [path.name for path in files if names.search(path.read_text())]


class Odd(nn.Module):
    """Experts in one parameter of an unusual name, behind a forward that no layout knows."""

    def __init__(self, crew):
        super().__init__()
        self.rise, self.sink = nn.Parameter(crew.gate_up_proj.detach()), nn.Parameter(crew.down_proj.detach())
        self.run = None

    def forward(self, x, index, weights):
        groups = ExpertGroups(index.reshape(-1), len(self.sink))
        gate, up = groups.matmul(x[groups.order // index.shape[1]], self.rise.mT).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        output = (self.run or groups.matmul)(*((groups, hidden, self.sink.mT) if self.run else (hidden, self.sink.mT)))
        return combine(groups, output, weights)


class OddLayout(Layout):
    name = "odd"
    description = "odd ones"
    switched = 0

    def detect(self, name, module, parent, down_proj, *, named):
        return self.layer(name, 0, module, "sink") if isinstance(module, Odd) else None

    def layer(self, name, index, module, down_proj):
        num_experts, d_out, d_in = module.sink.shape
        return ExpertLayer(name, index, num_experts, d_in, d_out, self.name, down_proj)

    def parameters(self, module, layer):
        return {"sink": module.sink}

    def weights(self, model, layer):
        return {"sink": model.get_submodule(layer.name).sink.detach()}

    def expert_parameters(self, module):
        return dict(module.named_parameters())

    @contextmanager
    def intercepted(self, module, layer, tap, dropout):
        with attached_state(module, tap, dropout):
            module.run = lambda groups, hidden, weight: down_proj_product(module, groups, hidden, weight, None, 0)
            try:
                yield
            finally:
                module.run = None

    @contextmanager
    def prepared(self, model):
        OddLayout.switched += 1
        yield


def test_a_further_layout_is_one_entry(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "odd", OddLayout())
    plain = toy_model()
    expected = LaplacePosterior(collect_factors(plain, answer_logits, [toy_batch()], rank=5))
    model = toy_model()
    for layer in model.layers:
        layer.mixture.crew = Odd(layer.mixture.crew)
    layers = find_expert_layers(model)
    assert [(layer.layout, layer.down_proj) for layer in layers] == [("odd", "sink")] * 2
    assert locate_expert_layers(nn.ModuleDict({"a": model}), layers)[0].name == "a.layers.0.mixture.crew"
    found = LaplacePosterior(collect_factors(model, answer_logits, [toy_batch()], rank=5, layers=layers))
    assert OddLayout.switched == 1
    torch.testing.assert_close(
        found.logit_covariance(model, answer_logits, toy_batch())[1],
        expected.logit_covariance(plain, answer_logits, toy_batch())[1],
    )
    with tapped_batch(model, layers, answer_logits, toy_batch()) as tapped:
        assert tapped.taps.slots(0).rows is None
    with pytest.raises(ValueError, match=r"has no expert layers.*odd ones"):
        find_expert_layers(nn.Linear(2, 2))
