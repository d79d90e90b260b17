"""A small model that is really built, a batch for it, and a count of the bytes that are alive."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from bmoe_lightning.experts import down_proj_parameters, expert_parameters, find_expert_layers
from recipes.planning.compute import Workload

WORK = Workload(batch_size=4, tokens=32, classes=4, rank=5)


def small_config(**options):
    settings = {
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        **options,
    }
    return Qwen2MoeConfig(**settings)


def built(dtype=torch.float32, attention="sdpa", **options):
    config = small_config(**options)
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2MoeForCausalLM(config).to(dtype).eval()
    model.requires_grad_(False)
    return model


class _Expert(nn.Module):
    def __init__(self, gate_up, down):
        super().__init__()
        self.gate, self.up, self.down = (_linear(weight) for weight in (*gate_up.chunk(2), down))

    def forward(self, x):
        return self.down(silu(self.gate(x)) * self.up(x))


def _linear(weight):
    linear = nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight.data = weight
    return linear


class _Experts(nn.ModuleList):
    def forward(self, tokens, index, weights):
        total = torch.zeros_like(tokens)
        for number, expert in enumerate(self):
            rows, choice = torch.where(index == number)
            total = total.index_add(0, rows, expert(tokens[rows]) * weights[rows, choice].unsqueeze(1))
        return total


def as_modules(model):
    """The same model with a module for every expert."""
    for block in model.model.layers:
        fused = block.mlp.experts
        block.mlp.experts = _Experts(map(_Expert, fused.gate_up_proj.data, fused.down_proj.data))
    return model.requires_grad_(False)


def class_logits(model, batch):
    logits = model(input_ids=batch["ids"], logits_to_keep=1, use_cache=False).logits[:, -1, 1:5]
    return logits.float(), batch["labels"]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that were made inside and are still alive, and their largest sum."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def known(self, tensors):
        """Leave out what was there before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _note(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self._known.discard(key)
        self.alive -= size


def small_batch():
    generator = torch.Generator().manual_seed(1)
    shape = (WORK.batch_size, WORK.tokens)
    return {
        "ids": torch.randint(50, shape, generator=generator),
        "labels": torch.randint(4, shape[:1], generator=generator),
    }


def train(model, part):
    """Let gradients reach a part of the experts; returns what is trained."""
    model.requires_grad_(False)
    found = find_expert_layers(model)
    choose = down_proj_parameters if part == "down_proj" else expert_parameters
    trained = [parameter for layer in found for parameter in choose(model, layer).values()]
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained
