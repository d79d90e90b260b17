"""The report of a run: tables, figures and the TensorBoard comparison."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.report import (
    label_budget_figure,
    library_versions,
    matplotlib_available,
    results_table,
    save_figure,
    summarise,
    write_figures,
    write_results,
    write_tensorboard,
)
from bmoe_lightning.utils.atomic_io import write_text
from recipes.qwen_obqa.label_budget import label_budget
from recipes.qwen_obqa.settings import ResolvedSettings
from recipes.qwen_obqa.sources import Source

if TYPE_CHECKING:
    from recipes.qwen_obqa.experiment import SeedRun


def report(settings: ResolvedSettings, source: Source, output: Path, runs: Sequence[SeedRun]) -> None:
    """Write tables, figures and the TensorBoard comparison, and print the results table.

    Args:
        settings: Resolved settings.
        source: Model and data.
        output: Folder of the run.
        runs: The completed runs of all seeds.
    """
    results = [result for run_of_seed in runs for result in run_of_seed.results()]
    rows = summarise(results)
    for sentence in dict.fromkeys(sentence for row in rows[:1] for sentence in row.warnings):
        warnings.warn(f"{rows[0].label}: {sentence}", stacklevel=2)
    hashes = {str(run_of_seed.seed): source.model_hash(run_of_seed.seed) for run_of_seed in runs}
    config = {**asdict(settings), "pretrained_weights": hashes}
    write_results(output, results, rows, config=config, versions=library_versions())
    comparison = output / "tensorboard"
    if comparison.is_dir():  # of the resumed run; event files cannot be replaced, so the folder is rewritten
        shutil.rmtree(comparison)
    write_tensorboard(comparison, results, rows)
    fits = {run_of_seed.seed: load_fit(run_of_seed.fit_folder)[0] for run_of_seed in runs}
    logits = {run_of_seed.seed: run_of_seed.predictions.logits(run_of_seed.methods[0]) for run_of_seed in runs}
    points = label_budget(runs[0].methods, fits, logits, results)
    if points:
        write_text(output / "label_budget.json", json.dumps([asdict(point) for point in points], indent=2) + "\n")
    if matplotlib_available():  # otherwise write_tensorboard has warned
        write_figures(output / "figures", results, rows)
        if points:
            names = [row.method for row in rows]
            save_figure(label_budget_figure(points, names), output / "figures" / "label_budget.png")
    print("\n" + results_table(rows), flush=True)
