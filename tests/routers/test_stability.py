"""Jaccard indices of chosen sets, against loops over sets."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles.models import answer_logits, tiny_qwen, toy_batch, toy_model

from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.routers import find_routers, intercepted_routers, mean_scores, sample_noise
from bmoe_lightning.routers.stability import (
    as_sets,
    chance_jaccard,
    jaccard,
    jaccard_by_layer,
    recorded_choices,
    susceptible_layers,
)


def chosen(tokens, num_experts, top_k):
    return torch.rand(tokens, num_experts).topk(top_k).indices


@pytest.mark.parametrize(("top_k", "other_k"), [(2, 2), (1, 1), (3, 1), (8, 8)])
def test_equals_a_loop_over_sets(top_k, other_k):
    one, other = chosen(60, 8, top_k), chosen(60, 8, other_k)
    found = jaccard(as_sets(one, 8), as_sets(other, 8))
    expected = [len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert (jaccard(as_sets(one, 8), as_sets(one.flip(-1), 8)) == 1).all()


def test_two_empty_sets_are_equal():
    empty, one = torch.zeros(1, 3, dtype=torch.bool), torch.tensor([[True, False, False]])
    assert jaccard(empty, empty).item() == 1
    assert jaccard(empty, one).item() == 0


@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (6, 3), (4, 4)])
def test_chance_is_the_mean_over_all_pairs(num_experts, top_k):
    sets = [set(found) for found in itertools.combinations(range(num_experts), top_k)]
    mean = sum(len(one & other) / len(one | other) for one in sets for other in sets) / len(sets) ** 2
    assert chance_jaccard(num_experts, top_k) == pytest.approx(mean)


def test_chance_of_eight_of_forty():
    assert chance_jaccard(40, 8) == pytest.approx(0.11, abs=0.01)


def test_draws_of_the_router_average_are_not_a_fixed_set():
    """J0 at noise of the size of the logits: most of the index under noise is the error of the average."""
    logits = torch.randn(150, 40)

    def drawn(samples, **options):
        noise = sample_noise(logits.shape, seed=0, router=0, samples=samples, **options)
        return as_sets(mean_scores([logits + noise], "softmax").log_mean.topk(8).indices, 40)

    floor = {
        (count, antithetic): jaccard(
            drawn(range(count), antithetic=antithetic), drawn(range(count, 2 * count), antithetic=antithetic)
        ).mean()
        for count, antithetic in [(36, False), (36, True), (200, False)]
    }
    assert floor[36, False].item() == pytest.approx(0.72, abs=0.04)
    assert floor[200, False].item() == pytest.approx(0.86, abs=0.04)
    assert floor[36, True] > floor[36, False] + 0.03


def record(model, batch, replace=None, parts=1):
    layers = find_expert_layers(model)
    routers = find_routers(model, layers=layers)
    with (
        torch.no_grad(),
        recorded_choices(model, layers) as choices,
        intercepted_routers(model, routers, replace or (lambda _router, _u, logits: logits)),
    ):
        for part in torch.arange(len(batch["ids"])).chunk(parts):
            answer_logits(model, {key: value[part] for key, value in batch.items()})
    return choices


def noisy(router, u, logits):
    """Noise on the logits that depends on layer and token, and grows with the layer."""
    return logits + (1 + 3 * router.index) * torch.sin(1e3 * u.sum(1, keepdim=True) + torch.arange(logits.shape[1]))


@pytest.mark.parametrize("parts", [1, 7])
def test_by_layer_whatever_the_number_of_batches(parts):
    model, batch = toy_model(), toy_batch(7)
    clean, other = record(model, batch, parts=parts), record(model, batch, noisy, parts=parts)
    assert all(len(calls) == parts for calls in clean.values())
    found = jaccard_by_layer(clean, other)
    whole = jaccard_by_layer(record(model, batch), record(model, batch, noisy))
    assert list(found) == [layer.name for layer in find_expert_layers(model)]
    assert found == pytest.approx(whole)
    assert len(set(found.values())) == len(found)
    assert set(jaccard_by_layer(clean, clean).values()) == {1.0}


def test_choices_are_those_of_the_routers_without_padding():
    model = tiny_qwen()
    batch = {"input_ids": torch.randint(1, 30, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    batch["attention_mask"][1, :2] = 0
    batch["attention_mask"][2, 4:] = 0
    real = batch["attention_mask"].bool().flatten()
    layers = find_expert_layers(model)
    routers = {router.experts: router.name for router in find_routers(model, layers=layers)}
    indices = {}
    for experts, name in routers.items():
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, experts=experts: indices.update({experts: output[2]})
        )
    with torch.no_grad(), recorded_choices(model, layers) as choices:
        model(**batch)
    for layer in layers:
        (sets,) = choices[layer.name]
        assert len(sets) == real.sum() == 14
        assert torch.equal(sets, as_sets(indices[layer.module_name], layer.num_experts)[real])


def test_the_third_of_the_layers_that_change_most():
    assert susceptible_layers({"a": 0.9, "b": 0.3, "c": 0.8, "d": 0.2}) == ["b", "d"]
    assert susceptible_layers({"a": 0.5, "b": 0.5, "c": 0.5}) == ["a"]
    assert susceptible_layers({"a": 1.0}) == ["a"]


def test_passes_that_do_not_belong_together():
    sets = torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="not the same; record the same layers"):
        jaccard_by_layer({"a": [sets]}, {"b": [sets]})
    with pytest.raises(ValueError, match="3 and 2 tokens in 'a'; run both over the same batches"):
        jaccard_by_layer({"a": [sets]}, {"a": [sets[:2]]})
    with pytest.raises(ValueError, match="0 and 0 tokens"):
        jaccard_by_layer({"a": []}, {"a": []})
