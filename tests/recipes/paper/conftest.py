"""A finished run of a study, on a model with random weights."""

from __future__ import annotations

import pytest

from recipes.qwen_obqa.experiment import completed_run
from recipes.qwen_obqa.settings import Settings


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Folder of a study, and its run: of methods without a fit, with a further run, with a fit to that, and LPO."""
    output = tmp_path_factory.mktemp("study")
    settings = Settings(
        methods=("map", "deep_ensemble", "laplace_mixture", "laplace_lpo"),
        output_dir=str(output / "runs" / "recall-experts"),
        seeds=1,
        dry_run=True,
        quiet=True,
        accelerator="cpu",
        zero_shot=False,
        batch_size=4,
        eval_batch_size=4,
    )
    with completed_run(settings.resolved(), announce=False) as (run,):
        return output, run
