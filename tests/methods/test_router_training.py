"""Training of routers beside a frozen model: steps of all ranks together, the epoch that is kept, what is unchanged."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from forked_processes import run
from oracles.models import answer_logits, split, tiny_qwen, toy_batch, toy_model

from bmoe_lightning.methods.router_schedule import RouterTrainingOptions
from bmoe_lightning.methods.router_training import RouterPasses
from bmoe_lightning.methods.training_data import Batches
from bmoe_lightning.routers import (
    CollapseWatch,
    MeanFieldLogits,
    TemperatureChoice,
    find_routers,
    gaussian,
    mean_routers,
    probe_routers,
    router_state,
    temperature,
)
from bmoe_lightning.utils.fit_warnings import collected_fit_warnings

DATA = toy_batch(num_rows=9, seed=4)


def passes(model, batches, losses=(3.0, 2.0, 2.5), **options):
    """Passes whose held-out loss is given, since there are no held-out data."""
    given = iter(losses)

    def held_out(_predict, *, key=None):
        loss = next(given)
        return torch.tensor([[[-loss, -1.0]]]), torch.tensor([0])

    return RouterPasses(model, answer_logits, Batches(batches), held_out, **{"seed": 0, "distributed": False} | options)


def nets_of(model, scale=0.5):
    return [MeanFieldLogits(router, scale, dtype=torch.float64) for router in find_routers(model)]


def test_the_epoch_with_the_least_held_out_loss_is_kept():
    model, nets, states = toy_model(), nets_of(toy_model()), []
    options = RouterTrainingOptions(epochs=2, learning_rate=0.02, beta=0.01)
    trained = passes(model, split(DATA, 5, 4), (3.0, 2.0, 2.5, 2.5, 2.6, 2.4))
    first = trained._held_out_log_probs
    trained._held_out_log_probs = lambda predict, key: (states.append(router_state(nets)), first(predict, key=key))[1]
    found = trained.train(0, nets, options, None)
    assert found.epoch == 1
    assert found.losses == (3.0, 2.0, 2.5)
    for name, value in router_state(nets).items():
        assert torch.equal(value, states[1][name])
        assert torch.equal(value, found.state[name])
    assert not torch.equal(states[0]["0.shift"], states[1]["0.shift"])
    assert not torch.equal(states[2]["0.shift"], states[1]["0.shift"])
    assert set(found.statistics) == {"kl", "scale_ratio"}  # the routers were not probed
    assert len(found.statistics["kl"]) == 2
    others = nets_of(model)
    again = trained.train(0, others, options, None)  # the same training, and other predictions
    assert again.epoch == 2
    assert torch.equal(router_state(others)["0.shift"], states[2]["0.shift"])
    untrained = passes(toy_model(), [DATA], (1.0, 2.0)).train(0, nets_of(toy_model()), replace(options, epochs=1), None)
    assert (untrained.epoch, untrained.statistics) == (0, {})


def test_training_lowers_the_loss_and_changes_nothing_else():
    model, nets = tiny_qwen(), nets_of(tiny_qwen())
    model.train()
    model.get_input_embeddings().requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()

    @torch.no_grad()
    def loss():
        return float(torch.nn.functional.cross_entropy(*answer_logits(model.eval(), DATA)))

    before = loss()
    model.train()
    options = RouterTrainingOptions(epochs=12, learning_rate=0.05, beta=1e-3)
    passes(model, split(DATA, 5, 4), range(100, 0, -1)).train(0, nets, options, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters())
    with mean_routers(model, nets):
        assert loss() < before - 0.05


def test_everything_is_restored_after_an_exception():
    model = toy_model().train()

    def failing(model, batch):
        answer_logits(model, batch)
        raise OSError("stop")

    broken = passes(model, [DATA])
    broken._class_logits = failing
    with pytest.raises(OSError, match="stop"):
        broken.train(0, nets_of(model), RouterTrainingOptions(1, 0.1, 0.1), None)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_ranks_train_as_one_process_with_all_their_data(tmp_path):
    # Noise so small that its numbers, which differ between ranks, do not matter.
    options = RouterTrainingOptions(epochs=2, learning_rate=0.02, beta=1e-9)
    alone = nets_of(toy_model(), 1e-4)
    passes(toy_model(), split(DATA, 4, 4, 1), range(9, 0, -1)).train(0, alone, options, None)
    expected = router_state(alone)
    assert expected["1.shift"].abs().max() > 1e-2

    def rank(number, world_size):
        shard = {name: values[number::world_size] for name, values in DATA.items()}
        batches = split(shard, *[2] * 2, *[1] * (len(shard["ids"]) - 4))  # one rank has a batch less
        nets = nets_of(toy_model(), 1e-4)
        passes(toy_model(), batches, range(9, 0, -1), distributed=True).train(0, nets, options, None)
        for name, value in router_state(nets).items():
            if "shift" in name:
                torch.testing.assert_close(value, expected[name], rtol=0.01, atol=1e-3)
        kept = [torch.zeros_like(value) for value in router_state(nets).values()]
        for value, copy in zip(router_state(nets).values(), kept, strict=True):
            copy.copy_(value)
            torch.distributed.broadcast(copy, 0)
            assert torch.equal(copy, value)

    run(rank, 2, tmp_path)


def test_the_learning_rate_falls_with_the_width():
    states = []
    for rate in (None, 0.64 / 6, 0.01):
        nets = nets_of(toy_model())
        passes(toy_model(), [DATA], (2.0, 1.0)).train(0, nets, RouterTrainingOptions(1, rate, 0.1), None)
        states.append(router_state(nets)["0.shift"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_random_choices_may_get_the_gradient_of_their_probability():
    model = tiny_qwen()
    routers = probe_routers(model, find_routers(model), lambda: answer_logits(model, DATA)[0].detach())
    states = []
    for score_function in (False, True):
        nets = [
            TemperatureChoice(router, returns_choice=True, temper_weights=False, dtype=torch.float64)
            for router in routers
        ]
        options = RouterTrainingOptions(2, 0.02, beta=0.0, score_function=score_function)
        passes(model, split(DATA, 5, 4), range(9, 0, -1)).train(0, nets, options, None)
        states.append(router_state(nets)["0.bias"])
    untrained = router_state([TemperatureChoice(routers[0], dtype=torch.float64)])["0.bias"]
    assert torch.equal(states[0], untrained)
    assert not torch.equal(states[1], untrained)


def test_a_collapse_is_warned_about(monkeypatch):
    monkeypatch.setattr(temperature, "CollapseWatch", partial(CollapseWatch, patience=2))
    model = tiny_qwen()
    routers = probe_routers(model, find_routers(model), lambda: answer_logits(model, DATA)[0].detach())
    nets = [TemperatureChoice(router, returns_choice=True, dtype=torch.float64) for router in routers]
    nets[1].bias.data.fill_(50.0)
    with collected_fit_warnings() as found:
        passes(model, split(DATA, 5, 4), range(9, 0, -1)).train(0, nets, RouterTrainingOptions(1, 1e-3, 0.01), None)
    said = [sentence for sentence in found if "has collapsed" in sentence]
    assert len(said) == 1
    assert "router 1" in said[0]


def test_gaussian_noise_that_collapses_is_warned_about(monkeypatch):
    monkeypatch.setattr(gaussian, "_PATIENCE", 2)
    monkeypatch.setattr(gaussian, "_COLLAPSED", 0.9)
    model = tiny_qwen()
    routers = probe_routers(model, find_routers(model), lambda: answer_logits(model, DATA)[0].detach())
    nets = [MeanFieldLogits(router, 0.5, dtype=torch.float64) for router in routers]
    nets[0].log_variance.data.fill_(-10.0)
    with collected_fit_warnings() as found:
        passes(model, split(DATA, 5, 4), range(9, 0, -1)).train(0, nets, RouterTrainingOptions(1, 1e-6, 0.01), None)
    said = [sentence for sentence in found if "has collapsed" in sentence]
    assert len(said) == 1
    assert re.search(r"router 0 has collapsed.*of its prior scale", said[0])


@pytest.mark.parametrize(("batches", "found"), [([], "are empty"), (iter([DATA]), "only once")])
def test_data_that_cannot_train_are_refused(batches, found):
    with pytest.raises(ValueError, match=found):
        passes(toy_model(), batches).train(0, nets_of(toy_model()), RouterTrainingOptions(1, 0.1, 0.1), None)


def test_training_data_without_labels_are_refused():
    batch = {name: values for name, values in DATA.items() if name != "labels"}
    with pytest.raises(ValueError, match=r"return \(logits, labels\)"):
        passes(toy_model(), [batch]).train(0, nets_of(toy_model()), RouterTrainingOptions(1, 0.1, 0.1), None)
