"""A small model that is really built, and a batch for it."""

from __future__ import annotations

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from bmoe_lightning.experts import down_proj_parameters, expert_parameters, find_expert_layers
from recipes.benchmark.separate_experts import separate_experts
from recipes.plan.compute import Workload

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


def as_modules(model):
    """The same model with a module for every expert."""
    separate_experts(model)
    return model.requires_grad_(False)


def class_logits(model, batch):
    logits = model(input_ids=batch["ids"], logits_to_keep=1, use_cache=False).logits[:, -1, 1:5]
    return logits.float(), batch["labels"]


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
