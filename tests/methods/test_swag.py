"""SWAG: its moments, its samples and what it refuses."""

import math

import pytest
import torch
from methods_cases import predictions
from oracles.models import answer_logits, toy_model

from bmoe_lightning.methods import SWAG, evaluate, fit_methods, save_snapshot
from bmoe_lightning.methods import swag as swag_module
from bmoe_lightning.methods.swag import free_memory, free_space, sample

DOWN = ["layers.0.mixture.crew.down_proj", "layers.1.mixture.crew.down_proj"]


@pytest.fixture
def paths(tmp_path):
    found = []
    for seed in (3, 4, 5, 6):
        found.append(tmp_path / f"{seed}.safetensors")
        save_snapshot(found[-1], {name: toy_model(seed).get_parameter(name) for name in DOWN})
    return found


def fitted(method, paths):
    return fit_methods([method], toy_model(), answer_logits, [], None, snapshots=paths, seed=7)


def test_moments_are_those_of_the_last_snapshots(paths):
    method = SWAG(num_snapshots=3)
    state = fitted(method, paths).state_of(method)
    for name in DOWN:
        rows = torch.stack([toy_model(seed).get_parameter(name).float() for seed in (4, 5, 6)])
        torch.testing.assert_close(state[f"mean/{name}"], rows.mean(0))
        torch.testing.assert_close(state[f"variance/{name}"], rows.var(0, unbiased=False))
        torch.testing.assert_close(state[f"deviations/{name}"], rows - rows.mean(0))
    assert method.hyperparameters(state) == {"members": 10, "snapshots": 3}


def test_samples_have_the_mean_and_the_covariance_of_the_paper(paths):
    method = SWAG(num_snapshots=4)
    state = fitted(method, paths).state_of(method)
    draws = torch.stack([sample(state, index)[DOWN[0]].flatten()[:6] for index in range(4000)])
    mean, variance, deviations = (
        state[f"{part}/{DOWN[0]}"].flatten(-3)[..., :6] for part in ("mean", "variance", "deviations")
    )
    covariance = torch.diag(variance) / 2 + deviations.T @ deviations / (2 * 3)
    scale = covariance.diagonal().sqrt()
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=float(4 * scale.max() / math.sqrt(4000)))
    relative = (draws.T.cov() - covariance) / (scale.unsqueeze(1) * scale)
    assert float(relative.abs().max()) < 0.12
    assert torch.equal(sample(state, 3)[DOWN[1]], sample(state, 3)[DOWN[1]])
    assert not torch.equal(sample(state, 3)[DOWN[1]], sample(state, 4)[DOWN[1]])


def test_predictions_are_averaged_over_samples(paths, batches):
    method, model = SWAG(num_samples=3), toy_model()
    fit = fitted(method, paths)
    found = evaluate([method], fit, model, answer_logits, batches)["swag"].log_probs
    expected = []
    for index in range(3):
        other = toy_model()
        with torch.no_grad():
            for name, value in sample(fit.state_of(method), index).items():
                other.get_parameter(name).copy_(value)
            expected.append(torch.cat([answer_logits(other, batch)[0].softmax(-1) for batch in batches]))
    torch.testing.assert_close(found.exp(), torch.stack(expected).mean(0), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), toy_model().parameters(), strict=True))


def test_refuses_too_few_snapshots(paths, batches):
    with pytest.raises(ValueError, match="after at least 2 epochs, and there are 1"):
        fitted(SWAG(), paths[:1])
    with pytest.raises(ValueError, match="at least 2 snapshots"):
        SWAG(num_snapshots=1)
    with pytest.raises(ValueError, match="at least 2 samples"):
        SWAG(num_samples=1)
    assert SWAG().needs.snapshots == 2
    with pytest.raises(KeyError):
        predictions(toy_model(), batches, SWAG())


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_refuses_a_state_that_does_not_fit_and_names_its_size(tmp_path, monkeypatch, what):
    model = toy_model().requires_grad_(False)
    for name in DOWN:
        model.get_parameter(name).requires_grad_(True)
    count = sum(model.get_parameter(name).numel() for name in DOWN)
    size = 4 * count * 7
    target = {"memory": "free_memory", "disk": "free_space"}[what]
    monkeypatch.setattr(swag_module, target, lambda *_: size)
    SWAG().check_run(model, tmp_path / "not" / "there")
    monkeypatch.setattr(swag_module, target, lambda *_: size - 1)
    with pytest.raises(ValueError, match=rf"GiB for {count:,} trained weights and 5 snapshots.*free {what}"):
        SWAG().check_run(model, tmp_path / "not" / "there")


def test_processes_of_one_machine_share_its_memory(tmp_path, monkeypatch):
    model = toy_model().requires_grad_(False)
    model.get_parameter(DOWN[0]).requires_grad_(True)
    size = 4 * model.get_parameter(DOWN[0]).numel() * 7
    monkeypatch.setattr(swag_module, "free_memory", lambda: 4 * size)
    monkeypatch.setattr(swag_module, "free_space", lambda _: size)  # which one process alone writes to
    SWAG().check_run(model, tmp_path, ranks_per_node=4)
    with pytest.raises(ValueError, match="free memory for each process"):
        SWAG().check_run(model, tmp_path, ranks_per_node=5)


def test_free_memory_and_space_are_known(tmp_path):
    assert free_space(tmp_path / "not" / "there") > 0
    memory = free_memory()
    assert memory is None or memory > 2**20
