import gc
import weakref

import pytest
import torch
from oracles.cases import in_layout, layouts
from oracles.models import answer_logits, toy_batch, toy_model

from bmoe_lightning.experts import find_expert_layers, tapped_batch

BATCH = toy_batch()


def built(layout, **config):
    return in_layout(toy_model(**config), layout)


def streamed(tapped, weights):
    """Gradients by position, and the positions in the order in which they came."""
    found = {}
    tapped.taps.stream_gradients(tapped.logits, weights, lambda position, gradient: found.update({position: gradient}))
    return [found[position] for position in sorted(found)], list(found)


@layouts
def test_the_same_gradients_the_last_layer_first(layout):
    model = built(layout, num_layers=3, idle=[1])
    with tapped_batch(model, find_expert_layers(model), answer_logits, BATCH) as tapped:
        weights = torch.rand_like(tapped.logits)
        for _ in range(2):
            found, order = streamed(tapped, weights)
            assert order == [2, 1, 0]
            for gradient, expected in zip(found, tapped.taps.gradients(tapped.logits, weights), strict=True):
                assert torch.equal(gradient, expected)
                assert not gradient.requires_grad


@layouts
def test_one_layer_at_a_time_is_held(layout):
    model = built(layout, num_layers=4)
    alive, most = [], 0

    def consume(position, gradient):
        nonlocal most
        gc.collect()
        alive.append(weakref.ref(gradient))
        most = max(most, sum(other() is not None for other in alive))

    with tapped_batch(model, find_expert_layers(model), answer_logits, BATCH) as tapped:
        tapped.taps.stream_gradients(tapped.logits, torch.ones_like(tapped.logits), consume)
    assert len(alive) == 4
    assert most <= 2  # the engine may still hold the one before


@layouts
def test_a_graph_that_begins_before_the_experts(layout):
    """Embeddings that want gradients themselves: not every way leads past the leaves that taps make."""
    model = built(layout)
    shift = torch.zeros(1, requires_grad=True)

    def class_logits(m, batch):
        handle = m.words.register_forward_hook(lambda _m, _i, output: output + shift)
        try:
            return answer_logits(m, batch)
        finally:
            handle.remove()

    with tapped_batch(model, find_expert_layers(model), class_logits, BATCH) as tapped:
        weights = torch.ones_like(tapped.logits)
        found, _ = streamed(tapped, weights)
        for gradient, expected in zip(found, tapped.taps.gradients(tapped.logits, weights), strict=True):
            assert torch.equal(gradient, expected)
            assert bool(gradient.any())
    assert shift.grad is None


@layouts
def test_layers_that_move_no_logit(layout):
    model = built(layout)
    model.tower = built(layout, seed=3).layers[0].mixture
    for crew in (model.tower.crew,) if layout == "fused" else ():
        crew.config = model.config

    def class_logits(m, batch):
        m.tower(torch.ones(2, 3, 6, dtype=torch.float64))  # runs, and nothing comes of it
        return answer_logits(m, batch)

    layers = find_expert_layers(model)
    with tapped_batch(model, layers, class_logits, BATCH) as tapped:
        found, _ = streamed(tapped, torch.ones_like(tapped.logits))
        assert [bool(gradient.any()) for gradient in found] == [True, True, False]
        assert found[2].shape == (*tapped.taps.slots(2).inputs.shape[:1], 6)


def test_an_exception_takes_the_hooks_away():
    model = built("fused")

    def consume(position, gradient):
        raise ZeroDivisionError

    with tapped_batch(model, find_expert_layers(model), answer_logits, BATCH) as tapped:
        with pytest.raises(ZeroDivisionError):
            tapped.taps.stream_gradients(tapped.logits, torch.ones_like(tapped.logits), consume)
        tapped.taps.gradients(tapped.logits, torch.ones_like(tapped.logits))
