"""The weights of fused experts as one `nn.Linear` each, the form that other libraries know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from bmoe_lightning.experts import find_expert_layers
from recipes.benchmark.workload import Shape, Workload


class _Expert(nn.Module):
    """One expert of linear layers, with the weights of a fused one."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate, self.up, self.down = _linear(gate), _linear(up), _linear(down)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


def _linear(weight: Tensor) -> nn.Linear:
    d_out, d_in = weight.shape
    linear = nn.Linear(d_in, d_out, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class _Experts(nn.ModuleList):
    """All experts, called one by one on the tokens routed to them."""

    def forward(self, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(tokens)
        for number, expert in enumerate(self):
            rows, choice = torch.where(index == number)
            total = total.index_add(0, rows, expert(tokens[rows]) * weights[rows, choice].unsqueeze(1))
        return total


def separate_experts(model: Any) -> None:
    """Replace the fused experts of a Qwen2-MoE model by the same ones as `nn.Linear`s in an `nn.ModuleList`."""
    for block in model.model.layers:
        fused = block.mlp.experts
        experts = _Experts(map(_Expert, fused.gate_up_proj.detach(), fused.down_proj.detach()))
        block.mlp.experts = experts.train(fused.training)


def separate_workload(shape: Shape, device: torch.device) -> Workload:
    """A workload whose experts are `nn.Linear`s."""
    work = Workload(shape, device)
    separate_experts(work.model)
    work.layers = find_expert_layers(work.model)
    return work
