"""`fit_posterior(trainer=...)` fits what the end of training would have: one process, DDP and FSDP2, over gloo."""

from __future__ import annotations

import json

import pytest
import torch
from completed_runs import KILLED_AT, METHODS, MORE
from test_distributed import assert_same_factors, assert_same_scalars, read, run_script

SCRIPT = "completed_runs.py"

pytestmark = pytest.mark.slow
strategies = pytest.mark.parametrize(("kind", "world_size"), [("ddp", 1), ("ddp", 2), ("fsdp", 2)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = run_script(tmp_path_factory.mktemp("completed"), "ddp", 1, 2, script=SCRIPT)
    return run_script(folder, "fsdp", 2, script=SCRIPT)


@pytest.fixture
def folder(runs, kind):
    return runs / kind


def told(folder, name, world_size):
    return json.loads((folder / f"{name}-{world_size}-0.json").read_text())


@strategies
@pytest.mark.parametrize("stage", ["fit", "resumed", "loaded", "given", "added", "nothing"])
def test_every_process_has_what_one_fits_when_training_ends(runs, folder, world_size, stage):
    expected, tensors = read(runs / "ddp", "fit", 1, 0)
    methods = METHODS if stage in ("fit", "resumed") else MORE
    scalars = {
        name: value
        for name, value in expected["scalars"].items()
        if not name.startswith("posterior/") or name.split("/")[1] in methods
    }
    assert len(scalars) == len(expected["scalars"]) - (methods is MORE)
    first, first_tensors = read(folder, stage, world_size, 0)
    for rank in range(world_size):
        found, found_tensors = read(folder, stage, world_size, rank)
        assert_same_scalars(found["scalars"], scalars)
        assert_same_factors(found_tensors, tensors)
        assert (found["states"], found["id"], found["sees"]) == (first["states"], first["id"], True)
        assert all(torch.equal(found_tensors[name], value) for name, value in first_tensors.items())
        assert found["wrote"] == (["save_snapshot"] * 2 * (stage == "fit") + ["save_fit"]) * (rank == 0)


@strategies
def test_a_killed_pass_resumes_with_the_snapshots_of_its_run(folder, kind, world_size):
    # Without sharded weights the first batch runs once more, for the gradients of the trained weights.
    stored = KILLED_AT if kind == "fsdp" else KILLED_AT - 1
    suffixes = [f"-rank{rank}of{world_size}" for rank in range(world_size)] if world_size > 1 else [""]
    left = told(folder, "left", world_size)
    snapshots = [name for name in left if name.startswith("snapshots/")]
    sums = [name for name in left if name.endswith(".safetensors") and name not in snapshots]
    assert len(snapshots) == 2
    assert len({name.split("-")[1].removesuffix(".safetensors") for name in sums}) == 1  # one curvature
    assert [name for suffix in suffixes for name in sums if name.endswith(f"{suffix}.safetensors")] == sums
    assert "index.json" not in left
    for rank in range(world_size):
        found, _ = read(folder, "resumed", world_size, rank)
        assert found["batches"] == read(folder, "fit", world_size, rank)[0]["batches"] - stored
        assert found["fits"] == list(METHODS[1:])
        assert all(name.startswith(f"snapshots/{found['id'][:8]}-epoch-") for name in snapshots)
    after = told(folder, "resumed-files", world_size)
    assert [name for name in after if not name.startswith("methods-")] == [
        "index.json",
        "posterior.safetensors",
        *snapshots,
    ]


@strategies
def test_predictions_of_a_completed_fit(runs, folder, world_size):
    _, expected = read(runs / "ddp", "test", 1, 0)
    assert set(expected) == {*METHODS, "labels"}
    for rank in range(world_size):
        _, found = read(folder, "test", world_size, rank)
        assert torch.equal(found.pop("labels"), expected["labels"])
        for name, log_probs in found.items():
            torch.testing.assert_close(log_probs, expected[name], rtol=1e-6, atol=1e-6)


@strategies
def test_methods_that_are_added_are_fitted_alone(folder, world_size):
    assert told(folder, "untouched", world_size) is True
    for rank in range(world_size):
        few, added, nothing = (read(folder, stage, world_size, rank)[0] for stage in ("few", "added", "nothing"))
        assert few["fits"] == ["laplace_evidence"]
        assert added["fits"] == ["temperature", "laplace_lpo"]
        # No curvature pass, which was all that the first ones looked at, but its first batch, which is compared with
        # the record of the fit's data; and one pass over the held-out data, whose first batch was looked at before.
        assert added["batches"] == read(folder, "fit", world_size, rank)[0]["batches"] - few["batches"] + 2
        # Data other than the fit's are refused where nothing is left to fit, too.
        assert (nothing["fits"], nothing["batches"]) == ([], added["batches"] - 1)
        assert few["id"] == added["id"] == nothing["id"]
        assert added["states"]["laplace_evidence"] == few["states"]["laplace_evidence"]
        assert nothing["states"] == added["states"]


@strategies
def test_a_folder_that_not_all_see_is_refused_by_all(folder, kind, world_size):
    for rank in range(world_size if kind == "fsdp" else 1):  # what is forked tells its parent
        said = json.loads((folder / f"unshared-{world_size}-{rank}.json").read_text())
        if world_size == 1:
            assert said is None
        else:
            assert "ranks find different fits in" in said
            assert "or some find none. Pass dirpath= with a folder that all machines share" in said


def test_processes_that_are_spawned(runs):
    """They get a copy of trainer and callback."""
    run_script(runs, "spawn", 2, script=SCRIPT)
    expected, tensors = read(runs / "ddp", "added", 2, 0)
    for rank in range(2):
        found, found_tensors = read(runs / "spawn", "added", 2, rank)
        assert_same_scalars(found["scalars"], expected["scalars"])
        assert_same_factors(found_tensors, tensors)
        assert found["id"] == read(runs / "spawn", "few", 2, rank)[0]["id"]
