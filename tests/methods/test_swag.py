"""SWAG: its moments, its samples and what it refuses."""

import math

import pytest
import torch
from methods_cases import predictions
from oracles.models import answer_logits, toy_model

from bmoe_lightning.methods import SWAG, evaluate, fit_methods, save_snapshot
from bmoe_lightning.methods import swag as swag_module
from bmoe_lightning.methods.swag import SnapshotGaussian, free_memory, moments
from bmoe_lightning.utils import safetensors_io
from recipes.common.live_bytes import LiveBytes

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


def test_moments_are_those_of_the_snapshots():
    rows = torch.stack([toy_model(seed).get_parameter(DOWN[0]) for seed in (4, 5, 6)])
    mean, variance, deviations = moments(iter(rows), 3)
    torch.testing.assert_close(mean, rows.mean(0).float())
    torch.testing.assert_close(variance, rows.var(0, unbiased=False).float())
    torch.testing.assert_close(deviations, (rows - rows.mean(0)).float())


def test_the_last_snapshots_are_used(paths):
    method = SWAG(num_snapshots=3)
    state = fitted(method, paths).state_of(method)
    assert method.hyperparameters(state) == {"members": 10, "snapshots": 3}
    used = []
    for seed in (0, 1):
        model = toy_model(seed)
        with method.members(model, state, paths)[1]:
            used.append({name: model.get_parameter(name).clone() for name in DOWN})
    expected = SnapshotGaussian(paths[1:], seed=7).sample(1)
    for name in DOWN:
        torch.testing.assert_close(used[0][name].float(), expected[name])
        assert torch.equal(used[0][name], used[1][name])


def test_samples_have_the_mean_and_the_covariance_of_the_paper(paths):
    samples = SnapshotGaussian(paths, seed=7)
    draws = torch.stack([samples.sample(index)[DOWN[0]].flatten()[:6] for index in range(1500)])
    rows = torch.stack([toy_model(seed).get_parameter(DOWN[0]).detach().float().flatten()[:6] for seed in (3, 4, 5, 6)])
    mean, deviations = rows.mean(0), rows - rows.mean(0)
    covariance = torch.diag(rows.var(0, unbiased=False)) / 2 + deviations.T @ deviations / (2 * 3)
    scale = covariance.diagonal().sqrt()
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=float(4 * scale.max() / math.sqrt(1500)))
    relative = (draws.T.cov() - covariance) / (scale.unsqueeze(1) * scale)
    assert float(relative.abs().max()) < 0.12
    assert torch.equal(samples.sample(3)[DOWN[1]], SnapshotGaussian(paths, seed=7).sample(3)[DOWN[1]])
    assert not torch.equal(samples.sample(3)[DOWN[1]], samples.sample(4)[DOWN[1]])


def test_predictions_are_averaged_over_samples(paths, batches):
    method, model = SWAG(num_samples=3), toy_model()
    fit = fitted(method, paths)
    found = evaluate([method], fit, model, answer_logits, batches, snapshots=paths)["swag"].log_probs
    samples, expected = SnapshotGaussian(paths, seed=7), []
    for index in range(3):
        other = toy_model()
        with torch.no_grad():
            for name, value in samples.sample(index).items():
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


def test_needs_the_snapshots_of_its_fit(paths, batches):
    method = SWAG(num_snapshots=4)
    fit = fitted(method, paths)

    def predicted(snapshots):
        return evaluate([method], fit, toy_model(), answer_logits, batches, snapshots=snapshots)

    with pytest.raises(ValueError, match="was fitted to 4 snapshots, and there are 3"):
        predicted(paths[1:])
    with pytest.raises(ValueError, match=r"content of .*5.safetensors is not that to which swag was fitted"):
        predicted([paths[0], paths[2], paths[1], paths[3]])
    save_snapshot(paths[2], {name: toy_model(9).get_parameter(name) for name in DOWN})
    with pytest.raises(ValueError, match=r"content of .*5.safetensors is not that"):
        predicted(paths)
    save_snapshot(paths[2], {DOWN[0]: toy_model(5).get_parameter(DOWN[0])})
    with pytest.raises(ValueError, match="contain different tensors"):
        predicted(paths)
    with pytest.raises(ValueError, match="contain different tensors"):
        fitted(method, paths)
    paths[2].unlink()
    with pytest.raises(FileNotFoundError):
        fitted(method, paths)


def test_refuses_a_sample_that_does_not_fit_and_names_its_size(tmp_path, monkeypatch):
    model = toy_model().requires_grad_(False)
    for name in DOWN:
        model.get_parameter(name).requires_grad_(True)
    largest = model.get_parameter(DOWN[0]).numel()
    size = 4 * (2 * largest + 8 * largest)
    monkeypatch.setattr(swag_module, "free_memory", lambda: size)
    SWAG().check_run(model, tmp_path)
    with pytest.raises(ValueError, match=rf"GiB for {2 * largest:,} trained weights, {largest:,} of them in the larg"):
        SWAG().check_run(model, tmp_path, ranks_per_node=2)
    monkeypatch.setattr(swag_module, "free_memory", lambda: None)
    SWAG().check_run(model, tmp_path)


def test_free_memory_is_known():
    memory = free_memory()
    assert memory is None or memory > 2**20


def test_moments_hold_few_copies_of_a_tensor():
    rows = [torch.randn(1 << 16).bfloat16() for _ in range(5)]
    with LiveBytes() as live:
        live.known(rows)
        moments((row.clone() for row in rows), 5)
    assert live.peak <= 4 * (5 + 2 + 0.5) * (1 << 16)


def test_damage_is_found_by_the_first_sample_and_in_files_that_are_replaced(paths):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        path.write_bytes(content)

    samples = SnapshotGaussian(paths, seed=0)
    samples.sample(0)
    save_snapshot(paths[1], {name: toy_model(9).get_parameter(name) for name in DOWN})
    damage(paths[1])
    for found in (samples, SnapshotGaussian(paths, seed=0)):
        with pytest.raises(ValueError, match="does not match its SHA-256 digest"):
            found.sample(1)


def test_every_file_is_verified_once(paths, monkeypatch):
    verified = []
    digest = safetensors_io.tensor_digest
    monkeypatch.setattr(safetensors_io, "tensor_digest", lambda *args: (verified.append(args[0]), digest(*args))[1])
    samples = SnapshotGaussian(paths, seed=0)
    for index in range(3):
        samples.sample(index)
    assert sorted(verified) == sorted(DOWN * len(paths))
