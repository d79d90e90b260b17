"""The report of a run: tables, figures and the TensorBoard comparison."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmoe_lightning.curvature import GradientShare
from bmoe_lightning.methods import FitResult
from bmoe_lightning.methods.curvature_warnings import discarded_energy
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
from bmoe_lightning.report.results import Row
from bmoe_lightning.utils.atomic_io import write_text
from recipes.qwen_obqa.hashes import run_hashes
from recipes.qwen_obqa.label_budget import DRAWS, DRY_RUN_DRAWS, label_budget
from recipes.qwen_obqa.settings import ResolvedSettings
from recipes.qwen_obqa.sources import Source
from recipes.qwen_obqa.zero_shot import ZERO_SHOT

if TYPE_CHECKING:
    from recipes.qwen_obqa.seed_run import SeedRun


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
    fits = {run_of_seed.seed: load_fit(run_of_seed.fit_folder)[0] for run_of_seed in runs}
    hashes = run_hashes(source, runs, fits)
    pretrained = {seed: found["pretrained_weights"] for seed, found in hashes["seeds"].items()}
    config = {**asdict(settings), "pretrained_weights": pretrained}
    curvatures = [entry for seed, fit in fits.items() for entry in curvature_entries(seed, fit)]
    notes = [*accuracy_notes(rows), *curvature_notes(curvatures)]
    details = {"curvatures": curvatures, "hashes": hashes}
    write_results(output, results, rows, config=config, versions=library_versions(), details=details, notes=notes)
    comparison = output / "tensorboard"
    if comparison.is_dir():  # of the resumed run; event files cannot be replaced, so the folder is rewritten
        shutil.rmtree(comparison)
    write_tensorboard(comparison, results, rows)
    logits = {run_of_seed.seed: run_of_seed.predictions.logits(run_of_seed.methods[0]) for run_of_seed in runs}
    draws = DRY_RUN_DRAWS if settings.dry_run else DRAWS
    points = label_budget(runs[0].methods, fits, logits, results, draws=draws)
    if points:
        write_text(output / "label_budget.json", json.dumps([asdict(point) for point in points], indent=2) + "\n")
    if matplotlib_available():  # otherwise write_tensorboard has warned
        write_figures(output / "figures", results, rows, each=not settings.dry_run)
        if points:
            names = [row.method for row in rows]
            save_figure(label_budget_figure(points, names), output / "figures" / "label_budget.png")
    print("\n".join(["", results_table(rows), *notes]), flush=True)


def accuracy_notes(rows: Sequence[Row]) -> list[str]:
    """A sentence if fine-tuning has lowered the accuracy.

    Args:
        rows: Rows of the table, the fine-tuned model first.
    """
    before = next((row.metrics["acc"].mean for row in rows if row.method == ZERO_SHOT.name), -math.inf)
    after = rows[0].metrics["acc"].mean
    if after >= before:
        return []
    return [
        f"Fine-tuning has lowered the accuracy on the test items from {before:.3f} ({ZERO_SHOT.label}) to {after:.3f} "
        f"({rows[0].label}): try fewer epochs or another learning rate."
    ]


def curvature_entries(seed: int, fit: FitResult) -> list[dict[str, Any]]:
    """What each curvature of a fit discards, and what it covers of the trained weights' gradient, as JSON values.

    Args:
        seed: Seed of the fit.
        fit: The fit.
    """
    return [
        {
            "seed": seed,
            "methods": [name for name, fitted in fit.methods.items() if digest in fitted.curvatures],
            **asdict(discarded_energy(posterior)),
            **_share_entry(fit.shares.get(digest)),
        }
        for digest, posterior in fit.posteriors.items()
    ]


def _share_entry(share: GradientShare | None) -> dict[str, float | None]:
    known = share or GradientShare(None)
    return {
        "gradient_share": known.share,
        "kappa": known.kappa,
        "kappa_standard_error": known.kappa_error,
        "trained_weights": known.num_trained,
    }


def curvature_notes(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each curvature discards and covers, for the seed that discards most.

    Args:
        entries: From `curvature_entries`, of all seeds.
    """
    most: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for entry in entries:
        key = tuple(entry["methods"])
        if key not in most or entry["total"] > most[key]["total"]:
            most[key] = entry
    return [
        f"Rank {entry['rank']} discards {entry['total']:.1%} of the curvature's energy, at most {entry['worst']:.1%} "
        f"in a layer ({entry['worst_layer']}; seed {entry['seed']}): {', '.join(methods)}.{_covered(entry)}"
        for methods, entry in most.items()
    ]


def _covered(entry: Mapping[str, Any]) -> str:
    share, kappa = entry.get("gradient_share"), entry.get("kappa")
    if not share or not kappa:
        return ""
    return f" The posterior covers {share:.0%} of the trained weights' gradient (kappa {kappa:.3g})."
