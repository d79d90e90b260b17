"""Families of transformers whose experts do not use its experts interface: registered or refused.

Each forward is that of the family's experts module with `down_proj` replaced by a call; see `register_experts`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bmoe_lightning.experts.grouped_matmul import ExpertGroups
from bmoe_lightning.experts.layouts.intercept import combine
from bmoe_lightning.experts.layouts.registered import refuse_experts, register_experts

DownProj = Callable[..., Tensor]
_MODELS = "transformers.models"


@register_experts(
    f"{_MODELS}.dbrx.modeling_dbrx.DbrxExperts", down_proj="mlp.w2", transposed=True, num_experts="num_experts"
)
def _dbrx(self: Any, down_proj: DownProj, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    x = hidden_states.reshape(-1, self.hidden_size)
    groups, tokens = _sorted_slots(index, self.num_experts)
    w1, v1 = (w.view(self.num_experts, -1, self.hidden_size).mT for w in (self.mlp.w1, self.mlp.v1))
    hidden = self.mlp.activation_fn(groups.matmul(x[tokens], w1)) * groups.matmul(x[tokens], v1)
    output = down_proj(hidden, groups.experts, tokens, len(x))
    return combine(groups, output, weights).view(hidden_states.shape[0], -1, self.hidden_size)


@register_experts(f"{_MODELS}.llama4.modeling_llama4.Llama4TextExperts", down_proj="down_proj", transposed=True)
def _llama4(self: Any, down_proj: DownProj, hidden_states: Tensor) -> Tensor:
    # Every expert gets every token, multiplied by zero unless the router chose the expert.
    num_experts = self.num_experts
    x = hidden_states.view(num_experts, -1, self.hidden_size)
    gate, up = torch.bmm(x, self.gate_up_proj).chunk(2, dim=-1)
    num_tokens = x.shape[1]
    experts = torch.arange(num_experts, device=x.device).repeat_interleave(num_tokens)
    tokens = torch.arange(num_tokens, device=x.device).repeat(num_experts)
    return down_proj((up * self.act_fn(gate)).flatten(0, 1), experts, tokens, num_tokens)


@register_experts(
    f"{_MODELS}.jetmoe.modeling_jetmoe.JetMoeMoE",
    down_proj="output_linear.weight",
    expert_parameters=("input_linear.weight", "output_linear.weight"),
)
def _jetmoe(self: Any, down_proj: DownProj, layer_input: Tensor) -> Tensor:
    x = layer_input.reshape(-1, self.input_size)
    _, tokens, weights, sizes, _ = self.router(x)
    gate, up = self.input_linear(x[tokens], sizes).chunk(2, dim=-1)
    every = torch.arange(len(sizes), device=x.device)
    experts = torch.repeat_interleave(every, torch.as_tensor(sizes, device=x.device), output_size=len(tokens))
    output = down_proj(self.activation(gate) * up, experts, tokens, len(x)) * weights.unsqueeze(1)
    return (torch.zeros_like(x).index_add(0, tokens, output) + self.bias).view_as(layer_input)


@register_experts(f"{_MODELS}.longcat_flash.modeling_longcat_flash.LongcatFlashExperts", down_proj="down_proj")
def _longcat_flash(self: Any, down_proj: DownProj, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    # The experts beyond the routed ones are identities without down_proj.
    groups, tokens = _sorted_slots(index, self.total_experts)
    x = hidden_states[tokens]
    gate, up = groups.matmul(x, self.gate_up_proj.mT).chunk(2, dim=-1)
    experts = groups.experts.clamp(max=self.num_routed_experts - 1)
    output = down_proj(self.act_fn(gate) * up, experts, tokens, len(hidden_states))
    identity = (groups.experts >= self.num_routed_experts).unsqueeze(1)
    return combine(groups, torch.where(identity, x, output), weights).to(hidden_states.dtype)


@register_experts(f"{_MODELS}.step3p7.modeling_step3p7.Step3p7Experts", down_proj="down_proj")
def _step3p7(self: Any, down_proj: DownProj, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    groups, tokens = _sorted_slots(index, self.num_experts)
    hidden = self._apply_gate(groups.matmul(hidden_states[tokens], self.gate_up_proj.mT))
    output = down_proj(hidden, groups.experts, tokens, len(hidden_states))
    return combine(groups, output, weights).to(hidden_states.dtype)


refuse_experts(
    f"{_MODELS}.doge.modeling_doge.DogeCDMoE",
    "each expert is one row of two embeddings, so there is no second linear layer to put a posterior on",
)


def _sorted_slots(index: Tensor, num_experts: int) -> tuple[ExpertGroups, Tensor]:
    """Sort the slots of `index [T, k]` by expert: their groups, and the token of each `[T k]`."""
    groups = ExpertGroups(index.reshape(-1), num_experts)
    return groups, groups.order // index.shape[1]
