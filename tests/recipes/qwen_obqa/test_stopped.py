"""A run that a signal stops at any stage is completed by the same command, with the same bits."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
from unittest import mock

import pytest
import torch

from recipes.qwen_obqa.__main__ import main

FLAGS = (
    "--methods",
    "map,temperature,laplace_evidence",
    "--limit-train",
    "32",
    "--epochs",
    "1",
    "--batch-size",
    "8",
    "--eval-batch-size",
    "8",
    "--limit-test",
    "16",
)
STAGES = {  # stage: a function that it calls several times, and the call at which the signal comes
    "training": ("bmoe_lightning.finetuner.ExpertFinetuner.training_step", 1),
    "curvature": ("bmoe_lightning.curvature.pass_sums._add_batch", 3),
    "calibration": ("bmoe_lightning.methods.plain_passes._SplitBuilder.add", 2),
    "evaluation": ("bmoe_lightning.methods.evaluation.Evaluation.add", 2),
    "report": ("recipes.qwen_obqa.reporting.write_results", 1),
}


def run(folder, *arguments):
    torch.manual_seed(0)
    return main(["--dry-run", "--quiet", "--accelerator", "cpu", "--output-dir", str(folder), *arguments])


def sending(target, call, number):
    """Patch a function so that its n-th call sends a signal to the process."""
    place, _, name = target.rpartition(".")
    original = getattr(pkgutil.resolve_name(place), name)
    calls = []

    def wrapped(*args, **options):
        calls.append(0)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **options)

    return mock.patch(target, wrapped)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(folder, *FLAGS) == 0
    return json.loads((folder / "results.json").read_text())["rows"]


@pytest.mark.parametrize("target", [target for target, _ in STAGES.values()])
def test_where_signals_come_is_still_there(target):
    assert callable(pkgutil.resolve_name(target))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number"), [*((stage, signal.SIGTERM) for stage in STAGES), ("curvature", signal.SIGINT)]
)
def test_stage(tmp_path, undisturbed, capsys, stage, number):
    folder = tmp_path / "run"
    with sending(*STAGES[stage], number):
        assert run(folder, *FLAGS) == 128 + number
    err = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name}: " in err
    assert "Traceback" not in err
    sums = list(folder.rglob("curvature_state-*"))
    assert bool(sums) == (stage == "curvature")
    assert run(folder, *FLAGS) == 0
    assert json.loads((folder / "results.json").read_text())["rows"] == undisturbed
    assert not list(folder.rglob("curvature_state-*"))
