"""Bayesian routers in training: the penalty in both ways, recomputed activations, padding, and what is left behind."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from oracles.models import answer_logits, tiny_qwen, toy_batch, toy_model
from torch.nn import functional as F

from bmoe_lightning.routers import (
    FullCovarianceLogits,
    MeanFieldLogits,
    TemperatureChoice,
    find_routers,
    intercepted_routers,
    probe_routers,
    step_noise,
    trained_routers,
)

BATCH = toy_batch()
BETA = 0.3


def nets_of(model, kind=MeanFieldLogits, batch=BATCH, **options):
    routers = probe_routers(model, find_routers(model), lambda: answer_logits(model, batch)[0])
    if kind is TemperatureChoice:
        nets = [kind(router, returns_choice=True, dtype=torch.float64, **options) for router in routers]
    else:
        nets = [kind(router, 0.5, dtype=torch.float64, **options) for router in routers]
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for net in nets for p in net.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return nets


def gradients(model, nets, batches, *, as_value, step=0, looks=False):
    """The gradients of one step over several batches, and the penalty; `looks`: around passes without gradients."""
    loss, penalty = 0.0, None
    model.requires_grad_(False)
    with trained_routers(model, nets, seed=7) as training:
        training.begin(step, penalty_weight=0.0 if as_value else BETA)
        look(model, batches[0], looks)
        for batch in batches:
            logits, labels = answer_logits(model, batch)
            loss = loss + F.cross_entropy(logits, labels) / len(batches)
        look(model, batches[0], looks)
        penalty = training.penalty() if as_value else torch.tensor(0.0)
        (loss + BETA * penalty).backward()
    found = [parameter.grad.clone() for net in nets for parameter in net.parameters()]
    for net in nets:
        net.zero_grad()
    return found, loss.detach(), penalty.detach()


def look(model, batch, wanted):
    if wanted:
        with torch.no_grad():
            answer_logits(model, batch)


def same(one, other, tolerance=1e-6):
    assert any(gradient.abs().max() > 1e-4 for gradient in one)
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 1e-2)


def explicit(model, nets, batches, step=0):
    """The same gradients, with the noise and the divergences written out."""
    model.requires_grad_(False)
    calls, penalties = {}, {}
    real = {id(batch): batch["mask"].bool().flatten() for batch in batches}

    def replace(router, u, logits):
        net, mask = nets[router.index], real[id(current[0])]
        call = calls[router.index] = calls.get(router.index, -1) + 1
        noise = step_noise((int(mask.sum()), 4), seed=7, router=router.index, step=step, call=call).double()
        found = net.distribution(u[mask], logits[mask])
        scale, shift = found.scale, found.mean - logits[mask]
        divergence = 0.5 * ((scale**2 + shift**2) / 0.25 - 1 - (scale**2 / 0.25).log()).sum(-1)
        penalties.setdefault(router.index, []).append(divergence)
        logits = logits.clone()
        logits[mask] = logits[mask] + shift + scale * noise
        return logits

    current, loss = [None], 0.0
    with intercepted_routers(model, [net.router for net in nets], replace, everywhere=True):
        for batch in batches:
            current[0] = batch
            logits, labels = answer_logits(model, batch)
            loss = loss + F.cross_entropy(logits, labels) / len(batches)
        (loss + BETA * sum(torch.cat(parts).mean() for parts in penalties.values())).backward()
    found = [parameter.grad.clone() for net in nets for parameter in net.parameters()]
    for net in nets:
        net.zero_grad()
    return found


@pytest.mark.parametrize("batches", [[BATCH], [BATCH, toy_batch(num_rows=3, length=5, seed=4)]], ids=["one", "two"])
def test_both_ways_give_the_gradients_of_the_loss_plus_beta_times_the_divergence(batches):
    model = toy_model()
    nets = nets_of(model)
    expected = explicit(model, nets, batches)
    for as_value in (True, False):
        same(gradients(model, nets, batches, as_value=as_value)[0], expected)


@pytest.mark.parametrize("kind", [FullCovarianceLogits, TemperatureChoice])
def test_both_ways_give_the_same_gradients(kind):
    model, batch = qwen(), {"ids": BATCH["ids"], "mask": BATCH["mask"], "labels": BATCH["labels"]}
    nets = nets_of(model, kind)
    one, other = (gradients(model, nets, [batch], as_value=way)[0] for way in (True, False))
    same(one, other)


def qwen(checkpointing=None):
    model = tiny_qwen().double()
    model.set_experts_implementation("eager")
    if checkpointing is not None:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
        )
        model.enable_input_require_grads()
    return model.train()


@pytest.mark.parametrize("checkpointing", ["plain", "reentrant"])
def test_recomputed_activations_get_the_same_numbers(checkpointing):
    # The first two batches are the same, and the third one has as many tokens.
    batches = [BATCH, BATCH, toy_batch(seed=5)]
    model = qwen()
    nets = nets_of(model)
    expected, loss, penalty = gradients(model, nets, batches, as_value=True)
    recomputed = qwen(checkpointing)
    same(gradients(recomputed, nets, batches, as_value=False)[0], expected)
    if checkpointing == "reentrant":
        with pytest.raises(RuntimeError, match="use_reentrant"):
            gradients(recomputed, nets, batches, as_value=True)
    else:
        found, other_loss, other = gradients(recomputed, nets, batches, as_value=True)
        same(found, expected)
        torch.testing.assert_close((other_loss, other), (loss, penalty))


@pytest.mark.parametrize("checkpointing", [None, "reentrant"])
def test_passes_without_gradients_count_in_nothing(checkpointing):
    batches = [BATCH, toy_batch(seed=5)]
    nets = nets_of(qwen())
    expected, loss, penalty = gradients(qwen(), nets, batches, as_value=True)
    model = qwen(checkpointing)
    for as_value in (True, False) if checkpointing is None else (False,):
        found, *values = gradients(model, nets, batches, as_value=as_value, looks=True)
        same(found, expected)
        if as_value:
            torch.testing.assert_close(values, [loss, penalty])


def test_both_ways_agree_under_automatic_mixed_precision():
    model = tiny_qwen(dtype=torch.float32)
    nets = [MeanFieldLogits(router, 0.5) for router in find_routers(model)]
    for net in nets:
        net.log_variance.data += 0.1
    with torch.autocast("cpu", torch.bfloat16):
        (one, _, penalty), (other, *_) = (gradients(model, nets, [BATCH], as_value=way) for way in (True, False))
    assert penalty.dtype == torch.float32
    same(one, other)


def test_padding_changes_nothing():
    model = toy_model()
    nets = nets_of(model)
    expected, loss, penalty = gradients(model, nets, [BATCH], as_value=True)
    for sides in ((3, 0), (0, 3)):
        wide = {name: F.pad(BATCH[name], sides) for name in ("ids", "mask")} | {"labels": BATCH["labels"]}
        found, other_loss, other = gradients(model, nets, [wide], as_value=True)
        same(found, expected)
        torch.testing.assert_close((other_loss, other), (loss, penalty), rtol=1e-6, atol=0)


def test_the_penalty_is_a_mean_over_tokens_that_does_not_depend_on_the_batch():
    model = toy_model()
    nets = nets_of(model)
    twice = {name: torch.cat([values, values]) for name, values in BATCH.items()}
    # Of the first router: the inputs of the second one depend on the noise, which differs between the halves.
    penalties = [gradients(model, nets[:1], [batch], as_value=True)[2] for batch in (BATCH, twice)]
    torch.testing.assert_close(penalties[0], penalties[1], rtol=1e-9, atol=0)
    with trained_routers(model, nets, seed=7) as training:
        training.begin(0)
        answer_logits(model, BATCH)
        totals = training.num_tokens()
        assert totals == {0: int(BATCH["mask"].sum()), 1: int(BATCH["mask"].sum())}
        half = training.penalty({index: 2 * count for index, count in totals.items()})
        torch.testing.assert_close(2 * half, training.penalty())


def test_steps_differ_and_are_reproducible():
    model = toy_model()
    nets = nets_of(model)
    state = torch.get_rng_state()
    one, again, other = (gradients(model, nets, [BATCH], as_value=True, step=step)[1] for step in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_outside_of_steps_and_afterwards_the_model_is_bitwise_itself():
    model = toy_model()
    plain = answer_logits(model, BATCH)[0]
    with trained_routers(model, nets_of(model), seed=0) as training:
        assert torch.equal(answer_logits(model, BATCH)[0], plain)
        training.begin(3)
        assert not torch.allclose(answer_logits(model, BATCH)[0], plain)
        twin = copy.deepcopy(model)
        training.end()
        assert torch.equal(answer_logits(model, BATCH)[0], plain)
        with pytest.raises(RuntimeError, match="call begin"):
            training.penalty()
    assert torch.equal(answer_logits(twin, BATCH)[0], plain)
    failing = nets_of(model)
    failing[1].trained = None
    with pytest.raises(TypeError):
        gradients(model, failing, [BATCH], as_value=True)
    assert torch.equal(answer_logits(model, BATCH)[0], plain)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_statistics_are_means_over_real_tokens():
    model = toy_model()
    nets = nets_of(model)
    with trained_routers(model, nets, seed=7) as training:
        training.begin(0)
        with pytest.raises(RuntimeError, match="no Bayesian router ran"):
            training.penalty()
        answer_logits(model, BATCH)
        found = training.statistics()
        assert set(found) == {"kl", "scale_ratio", "changed"}
        assert math.isclose(sum(found["kl"].values()), float(training.penalty().detach()), rel_tol=1e-9)
        assert 0 < found["changed"][0] < 1


def test_a_router_that_runs_by_itself_is_refused():
    model = toy_model()
    nets = nets_of(model)
    with trained_routers(model, nets, seed=7) as training:
        training.begin(0)
        with pytest.raises(RuntimeError, match="outside of a forward pass"):
            model.layers[0].mixture.router(torch.zeros(3, 6, dtype=torch.float64))
