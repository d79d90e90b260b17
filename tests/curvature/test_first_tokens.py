"""Slots of attention projections: the first token of a row attends to itself alone, so its query affects no logit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from oracles.factors import matrices
from transformers import LlamaConfig, LlamaForCausalLM

from bmoe_lightning.curvature import collect_factors
from bmoe_lightning.curvature.fisher import fisher_weights
from bmoe_lightning.experts import find_linear_layers

LENGTHS = (7, 5, 6, 3, 7, 4)
QUERIES, VALUES = "*.self_attn.q_proj", "*.self_attn.v_proj"
EVERY = tuple(range(len(LENGTHS)))
TOKENS = sum(LENGTHS)
# The last layer's queries matter at the last token alone.
COUNTS = [TOKENS - len(LENGTHS), TOKENS, len(LENGTHS), TOKENS]


def model_of(dtype=torch.float64, attention="sdpa"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=3, initializer_range=0.3, attn_implementation=attention,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(dtype)


def batch_of(chosen=EVERY, side="left", padding=0):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 32, (length,), generator=generator) for length in LENGTHS]
    width = max(LENGTHS) + padding
    ids, mask = (torch.zeros(len(chosen), width, dtype=torch.int64) for _ in range(2))
    for i, index in enumerate(chosen):
        at = slice(width - LENGTHS[index], width) if side == "left" else slice(0, LENGTHS[index])
        ids[i, at], mask[i, at] = rows[index], 1
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(model, batch, precision=nullcontext, sharpness=1.0):
    with precision():
        logits = model(**batch, use_cache=False).logits
    positions = torch.arange(batch["input_ids"].shape[1])
    last = (batch["attention_mask"] * (positions + 1)).argmax(1)
    # Some examples far surer than the others, whose gradients are tiny.
    scale = sharpness ** (torch.arange(len(last)) % 2)
    chosen = logits[torch.arange(len(last)), last, 1:4]
    return (chosen if chosen.dtype == torch.float64 else chosen.float()) * scale.unsqueeze(1), None


def factors_of(model, batches, layers=(QUERIES, VALUES), logits=logits_of, **options):
    return collect_factors(model, logits, batches, rank=24, layers=find_linear_layers(model, layers), **options)


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize(("attention", "side"), [("sdpa", "left"), ("sdpa", "right"), ("eager", "right")])
def test_counts_are_the_same_in_every_precision(attention, side):
    batch = batch_of(side=side)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = factors_of(model_of(dtype, attention), [batch])
        assert [float(layer.slots) for layer in found.layers] == COUNTS, dtype
    cast = factors_of(
        model_of(torch.float32, attention), [batch], logits=lambda model, batch: logits_of(model, batch, bfloat16)
    )
    assert [float(layer.slots) for layer in cast.layers] == COUNTS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_counts_do_not_depend_on_batches_and_padding(dtype):
    model = model_of(dtype)
    for batches in (
        [batch_of([i]) for i in EVERY],
        [batch_of(EVERY[:4], padding=3), batch_of(EVERY[4:], side="right")],
        [batch_of(EVERY[::-1], padding=9)],
    ):
        assert [float(layer.slots) for layer in factors_of(model, batches).layers] == COUNTS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_example_that_is_far_surer_counts_as_the_others(dtype):
    """Its gradients are some 1e-8 of theirs."""

    def sharp(model, batch):
        return logits_of(model, batch, sharpness=12.0)

    model, batch = model_of(dtype), batch_of()
    probs = sharp(model, batch)[0].detach().softmax(-1)
    assert float((1 - probs.amax(1)).min()) < 1e-5 < float((1 - probs.amax(1)).max())
    assert [float(layer.slots) for layer in factors_of(model, [batch], logits=sharp).layers] == COUNTS


def test_queries_by_definition():
    """Against gradients written out with the first tokens left out; without that they are counted."""
    model, batch = model_of(), batch_of()
    (layer, _) = find_linear_layers(model, QUERIES)
    seen = {}

    def see(_module, args, output):
        seen.update(inputs=args[0].detach(), outputs=output)

    hook = model.get_submodule(layer.name).register_forward_hook(see)
    logits = logits_of(model, batch)[0]
    hook.remove()
    real = batch["attention_mask"].bool()
    first = real & (real.cumsum(1) == 1)
    kept = real & ~first
    weights = fisher_weights("exact", logits.detach().log_softmax(-1), None, torch.Generator(), 3)
    gradients = [torch.autograd.grad(logits, seen["outputs"], w, retain_graph=True)[0] for w in weights]
    assert any(bool(gradient[first].any()) for gradient in gradients)
    count = int(kept.sum())
    a = sum(torch.outer(row, row) for row in seen["inputs"][kept]) / count
    g = sum(torch.outer(row, row) for gradient in gradients for row in gradient[kept]) / count
    found = factors_of(model, [batch], layers=(QUERIES,)).layers[0]
    assert float(found.slots) == count
    for matrix, expected in zip(matrices(found), (a, g), strict=True):
        torch.testing.assert_close(matrix[0], expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
