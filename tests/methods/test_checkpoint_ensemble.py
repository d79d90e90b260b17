"""The members of a checkpoint ensemble: how many, which, and what its fit says of them."""

from __future__ import annotations

import pytest
import torch
from methods_cases import fitted, predictions
from oracles.models import answer_logits, toy_model

from bmoe_lightning.methods import CheckpointEnsemble, fit_methods, save_snapshot
from bmoe_lightning.methods.base import scalar


@pytest.fixture
def paths(tmp_path):
    found = []
    for seed in (3, 4, 5):
        found.append(tmp_path / f"{seed}.safetensors")
        save_snapshot(found[-1], dict(toy_model(seed).named_parameters()))
    return found


@pytest.mark.parametrize(("asked", "given", "members"), [(5, 3, 3), (2, 3, 2), (3, 3, 3), (2, 2, 2)])
def test_the_fit_says_how_many_members_there_are(model, paths, asked, given, members):
    """Fewer than asked for, if the run was short."""
    method = CheckpointEnsemble(num_snapshots=asked)
    fit = fit_methods([method], model, answer_logits, [], snapshots=paths[:given])
    assert method.hyperparameters(fit.state_of(method)) == {"members": members}
    assert (method.needs.snapshots, method.needs.max_snapshots) == (2, asked)


def test_another_number_of_members_is_another_fit(model, paths):
    fit = fit_methods([CheckpointEnsemble(num_snapshots=3)], model, answer_logits, [], snapshots=paths)
    assert fit.differences(CheckpointEnsemble(num_snapshots=2)) == ["num_snapshots=3 (here 2)"]
    again = fit_methods([CheckpointEnsemble(num_snapshots=2)], model, answer_logits, [], snapshots=paths, earlier=fit)
    assert int(again.methods["checkpoint_ensemble"].state["members"]) == 2


def test_the_current_weights_are_no_member(batches, paths):
    """They may be later ones than the last snapshot, or those of `fit_at='best'`."""
    state = {"members": scalar(3)}
    fit = fitted((CheckpointEnsemble(), state))
    found = [
        predictions(toy_model(seed), batches, CheckpointEnsemble(), snapshots=paths, fit=fit)["checkpoint_ensemble"]
        for seed in (0, 8)
    ]
    assert torch.equal(found[0].log_probs, found[1].log_probs)
    assert not torch.equal(found[0].logits, found[1].logits)


@pytest.mark.parametrize("members", [0.0, -1.0, torch.nan])
def test_a_state_without_members_is_refused(members):
    with pytest.raises(ValueError, match="'members' must be positive"):
        CheckpointEnsemble().check_state({"members": scalar(members)})
    with pytest.raises(ValueError, match="lacks 'members'"):
        CheckpointEnsemble().check_state({})
