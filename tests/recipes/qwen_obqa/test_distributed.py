"""The recipe on several processes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from bmoe_lightning.methods.storage import load_fit
from recipes.common.errors import RecipeError
from recipes.qwen_obqa.distributed import agreed, first_then_others, joined, trainer_options
from recipes.qwen_obqa.settings import Settings

METHODS = "map,checkpoint_ensemble,temperature,laplace_evidence,laplace_lpo"


ONE_MACHINE = ("--standalone", "--nproc-per-node", "2")


def started(folder, launch, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launch,
         "-m", "recipes.qwen_obqa", "--dry-run", "--quiet", "--accelerator", "cpu", "--methods", METHODS,
         "--output-dir", str(folder), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip


def ended(run):
    try:
        return run.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        run.kill()
        raise


def torchrun(folder, *arguments, code=0):
    run = started(folder, ONE_MACHINE, *arguments)
    shown, said = ended(run)
    assert (run.returncode == 0) is (code == 0), shown[-2000:] + said[-4000:]
    return shown, said


def torchrun_on_two_machines(folder, *arguments):
    """Two launchers, each with a process of its own, as if each were on another machine."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}")
    launch = ("--nnodes", "2", "--nproc-per-node", "1", *meeting)
    runs = [started(folder, launch, *arguments) for _ in range(2)]
    told = [ended(run) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    return "".join(shown for shown, _ in told)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on two processes with each strategy, made when it is first asked for: its folder, and what it printed."""
    made = {}

    def run(strategy):
        if strategy not in made:
            folder = tmp_path_factory.mktemp(strategy) / "run"
            made[strategy] = folder, torchrun(folder, "--strategy", strategy)[0]
        return made[strategy]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["auto", "sharded"])
def test_a_run_and_its_continuation_have_the_same_bits(runs, tmp_path, strategy):
    finished, shown = runs(strategy)
    # One process talks.
    assert shown.count("Bayesian-MoE (LPO)") == shown.count("Done in") == shown.count("] evaluating") == 1
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    seed = folder / "seed-0"
    first, snapshots = load_fit(seed / "bayesian_moe")
    assert len(snapshots) == 2
    scores = (folder / "results.md").read_text()

    # As if it had been killed after the training.
    for path in (seed / "bayesian_moe").glob("*.*"):
        path.unlink()
    shutil.rmtree(seed / "predictions")
    shown, _ = torchrun(folder, "--strategy", strategy)
    assert "to the fine-tuned weights" in shown
    again, same = load_fit(seed / "bayesian_moe")
    assert (again.fingerprint, same) == (first.fingerprint, snapshots)
    for name, fitted in first.methods.items():
        assert all(torch.equal(value, again.methods[name].state[key]) for key, value in fitted.state.items())
    assert (folder / "results.md").read_text() == scores


@pytest.mark.slow
def test_another_strategy_trains_in_another_way(runs, tmp_path):
    shutil.copytree(runs("auto")[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "seed-0" / "predictions")
    _, said = torchrun(tmp_path / "run", "--strategy", "sharded", code=1)
    assert said.count("had other settings (strategy=") == 1


def metrics_table(folder):
    """The table of metrics; where LPO's objective is flat, its precisions below it depend on the order of sums."""
    return (folder / "results.md").read_text().split("\n\n")[0]


@pytest.mark.slow
def test_parts_of_weights_and_several_machines_change_nothing(runs, tmp_path):
    shown = torchrun_on_two_machines(tmp_path / "machines", "--strategy", "sharded")
    assert shown.count("Done in") == 1
    tables = [metrics_table(folder) for folder in (tmp_path / "machines", runs("auto")[0], runs("sharded")[0])]
    assert tables[0] == tables[1] == tables[2]


class TestAlone:
    def test_nothing_is_exchanged(self):
        settings = Settings().resolved()
        with joined(settings):
            assert trainer_options(settings) == {"devices": 1, "num_nodes": 1, "strategy": "auto"}
            assert (agreed(True), agreed(False)) == (True, False)
            assert first_then_others(lambda: 3) == 3

    def test_sharding(self):
        strategy = trainer_options(Settings(strategy="sharded").resolved())["strategy"]
        assert isinstance(strategy, ModelParallelStrategy)
        assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (1, 1)

    def test_an_error_stays_the_same(self):
        def fails():
            raise RecipeError("no such folder")

        with pytest.raises(RecipeError, match="no such folder"):
            first_then_others(fails)
