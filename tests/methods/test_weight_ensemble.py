from contextlib import contextmanager

import pytest
import torch
from methods_cases import predictions
from oracles.models import answer_logits, toy_model

from bmoe_lightning.methods import (
    MAP,
    CheckpointEnsemble,
    DeepEnsemble,
    save_snapshot,
    swapped_weights,
    weight_ensemble,
)

DOWN = ["layers.0.mixture.crew.down_proj", "layers.1.mixture.crew.down_proj"]


@pytest.fixture
def paths(tmp_path):
    """Snapshots of three other models' second weights."""
    found = []
    for seed in (3, 4, 5):
        found.append(tmp_path / f"{seed}.safetensors")
        save_snapshot(found[-1], {name: toy_model(seed).get_parameter(name) for name in DOWN})
    return found


def member(seed):
    """What a snapshot makes of the model, built without any of the code under test."""
    model = toy_model()
    with torch.no_grad():
        for name in DOWN:
            model.get_parameter(name).copy_(toy_model(seed).get_parameter(name))
    return model


def probabilities(model, batches):
    with torch.no_grad():
        return torch.cat([answer_logits(model, batch)[0].softmax(-1) for batch in batches])


def test_averages_probabilities_over_members(model, batches, paths):
    found = predictions(model, batches, CheckpointEnsemble(), snapshots=paths)["checkpoint_ensemble"]
    expected = torch.stack([probabilities(member(seed), batches) for seed in (3, 4, 5)]).mean(0)
    torch.testing.assert_close(found.log_probs.exp(), expected, rtol=1e-12, atol=1e-15)
    assert torch.equal(found.log_probs == -torch.inf, torch.cat([batch["absent"] for batch in batches]))
    assert torch.equal(found.labels, torch.cat([batch["labels"] for batch in batches]))


def test_a_file_that_is_gone_is_refused_before_the_first_batch(model, paths):
    class Untouchable:
        def __iter__(self):
            raise AssertionError("the pass over the data has begun")

    paths[1].unlink()
    for method, snapshots in ((DeepEnsemble(runs=tuple(paths)), ()), (CheckpointEnsemble(), paths)):
        with pytest.raises(FileNotFoundError, match=r"4\.safetensors"):
            predictions(model, Untouchable(), method, snapshots=snapshots)


def test_current_weights_count_once_as_a_member_of_a_deep_ensemble(model, batches, paths):
    method = DeepEnsemble(runs=tuple(paths[:2]))
    found = predictions(model, batches, method)["deep_ensemble"]
    models = [model, member(3), member(4)]
    expected = torch.stack([probabilities(m, batches) for m in models]).mean(0)
    torch.testing.assert_close(found.log_probs.exp(), expected, rtol=1e-12, atol=1e-15)
    assert method.hyperparameters({}) == {"members": 3}
    assert DeepEnsemble(size=4).needs.runs == 3
    assert method.needs.runs == 0


def test_a_single_member_is_not_taken_for_the_model_itself(model, batches, paths):
    for order in (1, -1):
        methods = [MAP(), CheckpointEnsemble()][::order]
        found = predictions(model, batches, *methods, snapshots=paths[:1])
        torch.testing.assert_close(found["map"].log_probs.exp(), probabilities(toy_model(), batches))
        torch.testing.assert_close(found["checkpoint_ensemble"].log_probs.exp(), probabilities(member(3), batches))


def test_loads_each_member_once_a_pass_and_takes_it_out(model, batches, paths, monkeypatch):
    loads = []

    @contextmanager
    def counted(model, path):
        loads.append(path)
        with swapped_weights(model, path):
            yield

    monkeypatch.setattr(weight_ensemble, "swapped_weights", counted)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    predictions(model, batches, CheckpointEnsemble(), MAP(), snapshots=paths)
    assert len(batches) == 3
    assert loads == paths
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_restores_the_weights_when_a_member_fails(model, batches, paths):
    calls = []

    def failing(model, batch):
        calls.append(batch)
        if len(calls) == 6:  # three batches of the model itself, then the third of the first member
            raise OSError("stop")
        return answer_logits(model, batch)

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(OSError, match="stop"):
        predictions(model, batches, CheckpointEnsemble(), snapshots=paths, class_logits=failing)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_takes_the_last_snapshots(model, batches, paths):
    found = predictions(model, batches, CheckpointEnsemble(num_snapshots=2), snapshots=paths)["checkpoint_ensemble"]
    expected = torch.stack([probabilities(member(seed), batches) for seed in (4, 5)]).mean(0)
    torch.testing.assert_close(found.log_probs.exp(), expected, rtol=1e-12, atol=1e-15)


def test_refuses_bad_members(model, batches, paths, tmp_path):
    save_snapshot(tmp_path / "part", {DOWN[0]: torch.zeros(4, 6, 5)})
    for files, kind, message in (
        ([], ValueError, "needs snapshots"),
        ([*paths, tmp_path / "gone"], FileNotFoundError, "gone"),
        ([paths[0], paths[0]], ValueError, "same snapshot twice"),
        ([paths[0], tmp_path / "part"], ValueError, "different tensors"),
    ):
        with pytest.raises(kind, match=message):
            predictions(model, batches, CheckpointEnsemble(), snapshots=files)
        if files:
            with pytest.raises(kind, match=message):
                predictions(model, batches, DeepEnsemble(runs=tuple(files)))


def test_refuses_too_few_members():
    with pytest.raises(ValueError, match="at least 2 snapshots"):
        CheckpointEnsemble(num_snapshots=1)
    with pytest.raises(ValueError, match="at least 2 members"):
        DeepEnsemble(size=1)
