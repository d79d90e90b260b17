"""Choices of experts that are put into a model: these experts, with the weights that the model gives them."""

from __future__ import annotations

import threading

import pytest
import torch
from oracles.models import answer_logits, tiny_qwen, toy_batch, toy_model

from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.routers import (
    TemperatureChoice,
    choice_ways,
    find_routers,
    injected_routers,
    intercepted_routers,
    probe_routers,
)
from bmoe_lightning.routers.choices import top_choice
from bmoe_lightning.routers.selection import restrict

BATCH = toy_batch()


def probed(model):
    return probe_routers(model, find_routers(model), lambda: run(model))


def run(model):
    with torch.no_grad():
        return answer_logits(model, BATCH)[0]


def chooses(router, *, returns_choice):
    return TemperatureChoice(router, returns_choice=returns_choice, dtype=torch.float64)


class Seen:
    """The weights of the experts of each token in one call of a block's experts, `[tokens, N]`."""

    def __init__(self, module):
        self.found = None
        self.handle = module.register_forward_pre_hook(self.record)

    def record(self, _module, args):
        _, experts, weights = args
        self.found = torch.zeros(len(experts), 4, dtype=weights.dtype).scatter(1, experts, weights)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_model_uses_the_chosen_experts_with_its_own_weights(normalised):
    model = tiny_qwen(norm_topk_prob=normalised)
    routers = probed(model)
    returns_choice = choice_ways(model, routers, lambda: run(model))
    assert returns_choice == (not normalised)
    nets = [chooses(router, returns_choice=returns_choice) for router in routers]
    chosen = torch.tensor([[0, 3], [2, 1]]).repeat(18, 1)[: BATCH["ids"].numel()]
    seen, kept = Seen(model.model.layers[0].mlp.experts), {}

    def keep(router, _u, logits):
        kept[router.index] = logits
        return logits

    def fixed(_net, _u, logits):
        return restrict(logits.log_softmax(-1), chosen)

    with intercepted_routers(model, routers, keep), injected_routers(model, nets, fixed):
        run(model)
    seen.handle.remove()
    weights = kept[0].softmax(-1).gather(1, chosen)
    if normalised:
        weights = weights / weights.sum(1, keepdim=True)
    expected = torch.zeros_like(seen.found).scatter(1, chosen, weights.to(seen.found.dtype))
    torch.testing.assert_close(seen.found, expected, rtol=1e-5, atol=1e-7)


def test_a_model_in_half_precision_may_round_weights_apart_though_its_router_computes_in_float32():
    model = tiny_qwen(norm_topk_prob=True, dtype=torch.float32)
    routers, calls = probed(model), []

    def rounded():
        calls.append(1)
        return run(model) * (1 + 2**-9 * len(calls))

    with pytest.raises(ValueError, match="depend on those that are not chosen"):
        choice_ways(model, routers, rounded)
    with torch.autocast("cpu", torch.bfloat16):
        assert not choice_ways(model, routers, rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("alone", [False, True], ids=["all", "the last router"])
def test_weights_that_are_not_normalised_are_noticed_in_any_precision(dtype, normalised, alone):
    """However little the weights of one layer, of many with small weights, change in the model's logits."""
    model = tiny_qwen(norm_topk_prob=normalised, num_hidden_layers=12, initializer_range=0.05, dtype=dtype)
    model.register_parameter("unused", torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)))
    routers = probed(model)
    assert choice_ways(model, routers[-1:] if alone else routers, lambda: run(model)) == (not normalised)


@pytest.mark.parametrize("normalised", [False, True])
def test_compiled_code_and_passes_of_other_threads_change_nothing(normalised):
    model, passes = tiny_qwen(norm_topk_prob=normalised), []
    routers = probed(model)
    model.compile(backend="eager")
    run(model)

    def with_another():
        passes.append(None)
        if len(passes) % 2:  # beside one of two passes that are compared
            other = threading.Thread(target=run, args=(model,))
            other.start()
            other.join()
        return run(model)

    assert choice_ways(model, routers, with_another) == (not normalised)


@pytest.mark.parametrize("normalised", [False, True])
def test_its_own_choice_is_the_model(normalised):
    model = tiny_qwen(norm_topk_prob=normalised, dtype=torch.float32)
    routers = probed(model)
    nets = [chooses(router, returns_choice=not normalised) for router in routers]
    with injected_routers(model, nets, lambda net, _u, logits: top_choice(net.router, logits)):
        torch.testing.assert_close(run(model), run(model), rtol=1e-5, atol=1e-5)
        found = run(model)
    torch.testing.assert_close(found, run(model), rtol=1e-5, atol=1e-5)


def test_a_linear_gate_whose_weights_are_not_normalised_is_refused():
    model = toy_model()
    with pytest.raises(ValueError, match="are not chosen"):
        choice_ways(model, probed(model), lambda: run(model))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_recorded_router_logits_are_those_of_the_model():
    model = tiny_qwen()
    nets = [chooses(router, returns_choice=True) for router in probed(model)]
    plain = model(input_ids=BATCH["ids"], attention_mask=BATCH["mask"], output_router_logits=True).router_logits
    with injected_routers(model, nets, lambda net, _u, logits: top_choice(net.router, logits)):
        found = model(input_ids=BATCH["ids"], attention_mask=BATCH["mask"], output_router_logits=True).router_logits
    torch.testing.assert_close(found[0], plain[0])
    assert len(find_expert_layers(model)) == len(found)


def test_a_choice_of_a_call_that_failed_is_not_used_in_the_next_one(monkeypatch):
    model = tiny_qwen(norm_topk_prob=False)
    routers = probed(model)
    nets = [chooses(router, returns_choice=True) for router in routers]
    plain, drawn = run(model), [True]
    other = torch.tensor([[0, 3], [2, 1]]).repeat(18, 1)[: BATCH["ids"].numel()]

    def chosen(_net, _u, logits):
        return restrict(logits.log_softmax(-1), other) if drawn else logits

    softmax = torch.nn.functional.softmax

    def fails(*arguments, **options):  # behind the router's linear map
        if drawn:
            raise MemoryError
        return softmax(*arguments, **options)

    with injected_routers(model, nets, chosen):
        monkeypatch.setattr(torch.nn.functional, "softmax", fails)
        with pytest.raises(MemoryError):
            run(model)
        drawn.clear()
        assert torch.equal(run(model), plain)
