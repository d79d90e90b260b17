"""The stages: each injects one kind of fault and stores what came of it, so that it is not repeated."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from bmoe_lightning.report import library_versions
from bmoe_lightning.utils.atomic_io import write_text
from bmoe_lightning.utils.folder_lock import locked_folder
from recipes.common.progress import step_progress
from recipes.common.silent_fits import silent_fits
from recipes.faults.damaged_files import Part, mutated
from recipes.faults.forked import forked
from recipes.faults.mutated_runs import mutated_runs
from recipes.faults.outcomes import Outcome, faults_of, store, stored, table
from recipes.faults.samples import fit_part, pass_part, run_part, served_part
from recipes.faults.settings import SHARES, STAGES, FaultSettings, Stage
from recipes.faults.subjects import ADAPTERS, RecipeRun, ScriptRun, Subject, draw_nothing
from recipes.faults.trials import (
    Step,
    Undisturbed,
    UndisturbedError,
    end_of,
    full_disks,
    killed,
    read_only_folders,
    signalled,
    undisturbed,
)
from recipes.faults.work_folder import emptied_folder, remove_folder

_SECONDS = 3600.0  # for all mutations of a kind
_PACKAGES = (
    "bmoe-lightning", "torch", "lightning", "transformers", "torchmetrics", "safetensors", "tensorboard", "matplotlib",
    "peft",
)  # fmt: skip
"""What a stored stage depends on; some are optional."""
RESULTS, REPORT = "results.json", "report.md"


def run(settings: FaultSettings) -> list[Outcome]:
    """Run the stages that an earlier command has not finished, and write the report.

    Args:
        settings: Settings.

    Returns:
        What came of the faults, in the order of the stages.

    Raises:
        UndisturbedError: If something fails without a fault.
        FolderInUseError: If another process uses the output folder.
        FileExistsError: If the output folder has a folder of another origin where the runs go.
        OSError: If it cannot be written.
    """
    output = Path(settings.output_dir).resolve()
    output.mkdir(parents=True, exist_ok=True)
    with locked_folder(output):
        runs = _Runs(settings, emptied_folder(output))
        found = [outcome for stage in STAGES if stage in settings.stages for outcome in _stage(stage, runs, output)]
        remove_folder(output)
        _report(settings, found, output)
    return found


class _Runs:
    """The runs without faults, each made when it is first needed."""

    def __init__(self, settings: FaultSettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self._made: dict[str, Undisturbed] = {}
        torch.set_num_threads(1)  # or children that are forked would wait for threads that they do not have
        draw_nothing()

    def of(self, name: str, subject: Subject) -> Undisturbed:
        """The finished run of a subject."""
        if name not in self._made:
            place = self.folder / name
            place.mkdir(parents=True)
            self._made[name] = undisturbed(subject, place / "whole")
        return self._made[name]

    def both(self) -> list[Undisturbed]:
        """Those of the recipe and of the script."""
        return [self.of("recipe", RecipeRun()), self.of("script", ScriptRun())]


def _stage(stage: Stage, runs: _Runs, output: Path) -> list[Outcome]:
    """The outcomes of a stage, from its file if it is finished."""
    settings, count = runs.settings, runs.settings.counts[stage]
    path = output / f"{stage}.json"
    key = {"count": count, "seed": settings.seed, "versions": library_versions(_PACKAGES)}
    found = None if settings.overwrite else stored(path, key)
    if found is None:
        total = 2 * sum(len(subject.stages) for subject in (RecipeRun, ScriptRun)) if count is None else count
        with step_progress(stage, total, shown=not settings.quiet) as advance:
            found = list(_INJECTED[stage](runs, total, random.Random(f"{stage} {settings.seed}"), advance))
        store(path, key, found)
    return found


def _kills(runs: _Runs, count: int, rng: random.Random, advance: Step) -> Iterable[Outcome]:
    for run_of, share in zip(runs.both(), _halves(count), strict=True):
        yield from killed(run_of, share, rng, advance)


def _disks(runs: _Runs, count: int, rng: random.Random, advance: Step) -> Iterable[Outcome]:
    for run_of, share in zip(runs.both(), _halves(count), strict=True):
        yield from full_disks(run_of, share, rng, advance)


def _read_only(runs: _Runs, count: int, rng: random.Random, advance: Step) -> Iterable[Outcome]:
    for run_of, share in zip(runs.both(), _halves(count), strict=True):
        yield from read_only_folders(run_of, share, rng, advance)


def _signals(runs: _Runs, count: int, rng: random.Random, advance: Step) -> Iterable[Outcome]:  # noqa: ARG001
    left = count
    for run_of in runs.both():
        found = list(signalled(run_of, left, advance))
        left -= sum(outcome.tried for outcome in found)
        yield from found


def _mutations(runs: _Runs, count: int, rng: random.Random, advance: Step) -> Iterable[Outcome]:
    shares = {name: count * share // 100 for name, share in SHARES.items()}
    if find_spec("peft") is None:
        del shares["adapters"]
    shares["fit"] += count - sum(shares.values())
    whole = runs.of("unsaved", RecipeRun(saves=False))
    if share := shares.pop("run again"):
        yield from mutated_runs(whole, share, rng, advance)
    makers: dict[str, Callable[[Path], Part]] = {
        "fit": fit_part,
        "killed pass": pass_part,
        "served model": lambda folder: served_part(whole.folder, folder),
    }
    if shares.get("adapters"):
        adapters = runs.of("adapters", RecipeRun(ADAPTERS, ("--seeds", "2"), saves=False))
        makers["adapters"] = lambda _: run_part("adapters", adapters.folder)
    for name, share in shares.items():
        if share:
            yield from _mutated(makers[name], share, runs.folder / "files" / name, rng.random(), advance)


def _mutated(make: Callable[[Path], Part], count: int, folder: Path, seed: float, advance: Step) -> list[Outcome]:
    """Mutations in a process of its own, since one that has run a backward pass cannot be forked any more."""
    target = folder.with_suffix(".json")
    folder.parent.mkdir(exist_ok=True)

    def action() -> int:
        with silent_fits():
            part = make(folder)
            found = mutated(part, count, random.Random(seed), lambda _: None, folder.with_name("copy"))
            found += part.further()
        target.write_text(json.dumps([outcome.described() for outcome in found]))
        return 0

    ended = forked(action, seconds=_SECONDS)
    if ended.status != 0:
        raise UndisturbedError(f"files to mutate could not be made (status {ended.status}): {end_of(ended)}")
    found = [Outcome.of(each) for each in json.loads(target.read_text())]
    for outcome in found:
        for _ in range(outcome.tried):
            advance(outcome.kind)
    return found


def _halves(count: int) -> tuple[int, int]:
    return count - count // 2, count // 2


_INJECTED: dict[Stage, Callable[[_Runs, int, random.Random, Step], Iterable[Outcome]]] = {
    "kills": _kills,
    "disks": _disks,
    "read-only": _read_only,
    "signals": _signals,
    "mutations": _mutations,
}


def _report(settings: FaultSettings, outcomes: Sequence[Outcome], output: Path) -> None:
    content = {
        "settings": asdict(settings),
        "versions": library_versions(_PACKAGES),
        "outcomes": [outcome.described() for outcome in outcomes],
        "faults": faults_of(outcomes),
    }
    write_text(output / RESULTS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    faults = "".join(f"- {line}\n" for line in faults_of(outcomes))
    write_text(output / REPORT, "\n\n".join(["# Injected faults", table(outcomes), faults]).rstrip() + "\n")
