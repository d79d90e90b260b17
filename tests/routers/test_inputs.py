"""Inputs of models and routers, changed while they run."""

from __future__ import annotations

import pytest
import torch
from oracles.models import answer_logits, split, tiny_qwen, toy_batch, toy_model

from bmoe_lightning.routers import find_routers, intercepted_routers
from bmoe_lightning.routers.inputs import (
    EMBEDDINGS,
    MeanNorms,
    RowNoise,
    add_noise,
    changed_inputs,
    embeddings_of,
    place_of,
)
from bmoe_lightning.routers.token_rows import TokenRows


def unchanged(_place, values, _rows):
    return values


def recorded_inputs(model, batch, **changes):
    """The input of every router, and the model's logits."""
    seen = {}

    def record(router, u, logits):
        seen[router.index] = u.clone()
        return logits

    with torch.no_grad(), changed_inputs(model, **changes), intercepted_routers(model, find_routers(model), record):
        logits = answer_logits(model, batch)[0]
    return seen, logits


def test_a_change_of_nothing_is_bitwise_the_model():
    model, batch = toy_model(), toy_batch()
    expected = answer_logits(model, batch)[0]
    everything = {"embeddings": embeddings_of(model, "words"), "routers": find_routers(model)}
    assert torch.equal(recorded_inputs(model, batch, change=unchanged, **everything)[1], expected)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_noise_on_embeddings_is_that_of_the_embedding_and_is_propagated(pad):
    model, batch, noise = toy_model(), toy_batch(pad=pad), RowNoise(3)
    change = add_noise({EMBEDDINGS: 0.3}, noise)
    seen, logits = recorded_inputs(model, batch, change=change, embeddings=embeddings_of(model, "words"))
    clean, _ = recorded_inputs(model, batch, change=unchanged)
    assert all(not torch.equal(seen[index], clean[index]) for index in clean)

    added = 0.3 * noise.at(EMBEDDINGS, TokenRows.of_mask(batch["mask"]), model.config.width)
    handle = model.words.register_forward_hook(lambda _module, _args, output: output + added)
    torch.testing.assert_close(logits, answer_logits(model, batch)[0])
    handle.remove()


def test_noise_on_the_input_of_a_router_is_what_it_sees_in_addition():
    model, batch, noise = toy_model(), toy_batch(), RowNoise(3)
    router = find_routers(model)[1]
    change = add_noise({place_of(router): 1e-9}, noise)
    seen, _ = recorded_inputs(model, batch, change=change, routers=[router])
    clean, _ = recorded_inputs(model, batch, change=unchanged)
    assert torch.equal(seen[0], clean[0])
    numbers = noise.at(place_of(router), TokenRows.of_mask(batch["mask"]), router.d_in).flatten(0, 1)
    torch.testing.assert_close((seen[1] - clean[1]) / 1e-9, numbers.double(), atol=1e-3, rtol=0)


def test_the_experts_get_what_they_get_without_noise_on_the_routers():
    model, batch = toy_model(top_k=4), toy_batch()  # all experts, whose weights alone change

    def into_experts(change):
        seen = []
        handle = model.layers[0].mixture.crew.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        routers = find_routers(model)[:1]
        recorded_inputs(model, batch, change=change, routers=routers)
        handle.remove()
        return seen[0]

    assert torch.equal(into_experts(unchanged), into_experts(add_noise({1: 0.5}, RowNoise(0))))


def test_the_router_of_transformers_gets_the_noise():
    model = tiny_qwen()
    batch = {"input_ids": torch.randint(1, 30, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    routers = find_routers(model)
    seen = []

    def record(_router, u, logits):
        seen.append(u)
        return logits

    with torch.no_grad(), intercepted_routers(model, routers[:1], record):
        model(**batch)
        with changed_inputs(model, lambda _place, values, _rows: 2 * values, routers=routers[:1]):
            model(**batch)
    torch.testing.assert_close(seen[1], 2 * seen[0])
    assert embeddings_of(model) == [model.get_input_embeddings()]


def test_noise_of_a_row_does_not_depend_on_the_batch():
    whole, noise = toy_batch(6), RowNoise(2)
    rows = TokenRows.of_mask(whole["mask"])
    expected = noise.at(1, rows, 4)
    first = 0
    for part in split(whole, 1, 3, 2):
        noise.begin(first)
        found = noise.at(1, TokenRows.of_mask(part["mask"]), 4)
        real = part["mask"].bool()
        assert torch.equal(found[real], expected[first : first + len(real)][real])
        first += len(real)
    assert expected[0][-1].tolist() != expected[1][-1].tolist()
    noise.begin(0)
    assert not torch.equal(noise.at(2, rows, 4), expected)


def test_mean_norms_leave_padding_out():
    model, batch, norms = toy_model(), toy_batch(), MeanNorms()
    routers = find_routers(model)
    changes = {"embeddings": embeddings_of(model, "words"), "routers": routers}
    seen, _ = recorded_inputs(model, batch, change=norms.measure, **changes)
    real = batch["mask"].bool()
    expected = model.words(batch["ids"]).detach()[real].norm(dim=-1).mean()
    assert norms.found[EMBEDDINGS] == pytest.approx(float(expected))
    for router in routers:
        expected = seen[router.index][real.flatten()].norm(dim=-1).mean()
        assert norms.found[place_of(router)] == pytest.approx(float(expected))


def test_what_cannot_be_changed_is_refused():
    model, batch = toy_model(), toy_batch()
    with pytest.raises(ValueError, match="ToyMoE does not tell which module embeds its tokens; name it"):
        embeddings_of(model)
    with pytest.raises(ValueError, match="has no module 'word'"):
        embeddings_of(model, "word")
    with pytest.raises(RuntimeError, match="the module that embeds tokens did not run"):
        recorded_inputs(model, batch, change=unchanged, embeddings=[torch.nn.Embedding(2, 2)])
    router = find_routers(model)[0]
    unused = pytest.raises(RuntimeError, match="1 of 1 routers did not run as modules")
    with unused, changed_inputs(model, unchanged, routers=[router]):
        pass
    narrow = pytest.raises(RuntimeError, match="was called without a tensor of its width 6")
    with narrow, changed_inputs(model, unchanged, routers=[router]):
        model.get_submodule(router.name)(torch.zeros(2, 5))


def test_the_model_is_restored_after_an_exception():
    model, batch = toy_model(), toy_batch()
    expected = answer_logits(model, batch)[0]

    def failing(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        recorded_inputs(model, batch, change=failing, routers=find_routers(model))
    assert torch.equal(answer_logits(model, batch)[0], expected)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
