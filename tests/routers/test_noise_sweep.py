"""The test of routing stability, against passes that are made by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from oracles.models import answer_logits, split, toy_batch, toy_model

from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.routers import find_routers, intercepted_routers, sample_noise
from bmoe_lightning.routers.inputs import RowNoise, add_noise, changed_inputs, embeddings_of
from bmoe_lightning.routers.noise_sweep import GAMMAS, noise_sweep
from bmoe_lightning.routers.stability import chance_jaccard, jaccard_by_layer, recorded_choices

SIZES = (0.0, 0.05, 0.4)


def runner(model, scale=0.0, samples=1):
    """Runs the model along routes under noise of a size; a draw is another seed."""

    def run(batch, draw):
        for sample in range(samples):

            def noisy(router, u, logits, sample=sample):
                numbers = sample_noise(logits.shape[1:], seed=10 + draw, router=router.index, samples=[sample])
                return logits + scale * numbers[0]

            with torch.no_grad(), intercepted_routers(model, find_routers(model), noisy):
                answer_logits(model, batch)

    return run


def swept(model, batches, run=None, gammas=SIZES, **options):
    return noise_sweep(model, run or runner(model), batches, gammas=gammas, embeddings="words", **options)


def names(model):
    return [layer.name for layer in find_expert_layers(model)]


def test_equals_passes_made_by_hand():
    model, batch = toy_model(), toy_batch(6)
    found = swept(model, [batch], seed=4)
    layers = find_expert_layers(model)

    def choices(context):
        with recorded_choices(model, layers) as recorded, context:
            runner(model)(batch, 0)
        return recorded

    real = batch["mask"].bool()
    norm = float(model.words(batch["ids"]).detach()[real].norm(dim=-1).mean())
    embedding = embeddings_of(model, "words")
    clean = choices(changed_inputs(model, lambda _place, values, _rows: values))
    noisy = choices(changed_inputs(model, add_noise({0: 0.4 * norm}, RowNoise(4)), embeddings=embedding))
    assert found.embeddings[0.4] == pytest.approx(jaccard_by_layer(clean, noisy))
    assert found.embeddings[0.4] != found.embeddings[0.05]


def test_noise_on_a_router_is_seen_by_no_other_layer():
    """Each layer against a pass in which its router alone has noise."""
    model, batch = toy_model(num_layers=3), toy_batch(6)
    found = swept(model, [batch], seed=4).inputs[0.4]
    layers, routers, real = find_expert_layers(model), find_routers(model), batch["mask"].bool().flatten()
    seen = {}

    def record(router, u, logits):
        seen[router.index] = float(u[real].norm(dim=-1).mean())
        return logits

    def choices(change, routers):
        with recorded_choices(model, layers) as recorded, changed_inputs(model, change, routers=routers):
            runner(model)(batch, 0)
        return recorded

    with torch.no_grad(), intercepted_routers(model, routers, record):
        answer_logits(model, batch)
    clean = choices(lambda _place, values, _rows: values, routers)
    for layer, router in zip(layers, routers, strict=True):
        noisy = choices(add_noise({1 + router.index: 0.4 * seen[router.index]}, RowNoise(4)), [router])
        assert found[layer.name] == pytest.approx(jaccard_by_layer(clean, noisy)[layer.name])
        assert found[layer.name] < 1


@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (3, 4)])
def test_by_layer_whatever_the_number_of_batches(sizes):
    model, batch = toy_model(num_layers=3), toy_batch(7)
    run = runner(model)
    found, whole = (swept(model, parts, run, (0.4,), seed=1) for parts in (split(batch, *sizes), [batch]))
    for place in ("embeddings", "inputs"):
        assert list(found.under(place)[0.4]) == names(model)
        assert found.under(place)[0.4] == pytest.approx(whole.under(place)[0.4])
    assert len(set(whole.embeddings[0.4].values())) == len(names(model))


def test_without_noise_routes_are_the_same_also_those_of_a_random_router():
    model, batch = toy_model(), toy_batch()
    found = swept(model, [batch], runner(model, scale=1.0, samples=3))
    for place in ("embeddings", "inputs"):
        assert set(found.under(place)[0.0].values()) == {1.0}
        assert max(found.under(place)[0.4].values()) < 1.0


def test_the_floor_is_that_of_two_draws():
    model, batch = toy_model(), toy_batch()
    assert set(swept(model, [batch], None, (0.0,)).floor.values()) == {1.0}
    run, layers = runner(model, scale=1.0, samples=4), find_expert_layers(model)
    found = swept(model, [batch], run, (0.0,))

    def choices(draw):
        with recorded_choices(model, layers) as recorded:
            run(batch, draw)
        return recorded

    assert found.floor == pytest.approx(jaccard_by_layer(choices(0), choices(1)))
    assert max(found.floor.values()) < 0.9
    assert found.chance == pytest.approx(dict.fromkeys(names(model), chance_jaccard(4, 2)))


def test_more_padding_changes_nothing():
    model, batch = toy_model(), toy_batch(5)
    wider = {key: torch.nn.functional.pad(batch[key], (3, 0)) for key in ("ids", "mask")}
    found, padded = (swept(model, [one], None, (0.4,)) for one in (batch, {**wider, "labels": batch["labels"]}))
    assert found == padded


def test_the_model_and_random_states_are_restored_also_after_an_exception():
    model, batch = toy_model().train(), toy_batch()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()

    before = states()

    def failing(found, draw):
        assert not model.training
        torch.rand(1), random.random(), np.random.rand()
        if draw:
            raise RuntimeError("mine")
        runner(model)(found, draw)

    with pytest.raises(RuntimeError, match="mine"):
        swept(model, [batch], failing)
    assert states() == before
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_what_cannot_be_measured_is_refused():
    model = toy_model()
    with pytest.raises(ValueError, match="there is no batch to measure the stability of routes on"):
        swept(model, [])
    with pytest.raises(ValueError, match="must be numbers of at least 0, at least one, got"):
        noise_sweep(model, runner(model), [toy_batch()], gammas=(), embeddings="words")
    assert GAMMAS[4] == 0.01
