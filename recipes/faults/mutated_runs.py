"""Mutate a file of a finished run, and run the same command: refused with the file's name, or the same numbers."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from bmoe_lightning.utils.file_header import DamagedFileError
from recipes.faults.damaged_files import drawn, kind_of
from recipes.faults.mutations import DAMAGES, mutation
from recipes.faults.outcomes import Outcome
from recipes.faults.trials import Step, Undisturbed, end_of
from recipes.qwen_obqa.run_folder import RUN_FILE

# What a run resumes from; the other files are written anew by every run.
_RESUMED = (RUN_FILE, "model/**/*", "seed-*/**/*.*")


def mutated_runs(run: Undisturbed, count: int, rng: random.Random, advance: Step) -> list[Outcome]:
    """Mutate files of a finished run, and run its command again.

    Args:
        run: A finished run, which is copied.
        count: Number of mutations.
        rng: Source of all choices.
        advance: Called after each.

    Returns:
        What came of them, by kind of file.
    """
    outcomes: dict[str, Outcome] = {}
    folder, tried = run.folder.with_name("mutated"), 0
    while tried < count:
        run.subject.remove(folder)
        shutil.copytree(run.folder, folder)
        found = {path for pattern in _RESUMED for path in folder.glob(pattern)}
        path = drawn(sorted(path for path in found if path.is_file() and path.stat().st_size), rng)
        # Other values under digests of their own are those of another run.
        change = mutation(path, rng, DAMAGES, lambda _: [])
        if change is None:
            continue
        place, kind = f"{path.relative_to(folder)}, {change.name}", f"run again: {kind_of(path)}"
        change.apply(path, folder)
        outcome, fault = _outcome(run, folder, path)
        tried += 1
        outcomes.setdefault(kind, Outcome(kind)).add(outcome, fault and f"{place}: {fault}")
        advance(f"run again, {tried} of {count}")
    run.subject.remove(folder)
    return [outcomes[kind] for kind in sorted(outcomes)]


def _outcome(run: Undisturbed, folder: Path, path: Path) -> tuple[str, str]:
    """The outcome, and what was not handled."""
    ended = run.subject.run(folder)
    if ended.status != 0:
        told = "error: " in ended.text and str(folder) in ended.text and "Traceback" not in ended.text
        return "refused", "" if told else f"ends with status {ended.status} without its path: {end_of(ended)}"
    outcome = "repaired" if " again" in ended.text else "no effect"
    try:
        wrong = run.subject.differences(folder, run.content)
    except DamagedFileError as error:
        # A finished run does not read all of its files; whoever reads the damaged one is told so, as here.
        if str(path) not in str(error):
            raise
        outcome = "no effect"
        wrong = [name for name, value in run.subject.numbers(folder).items() if value != run.content[name]]
    return outcome, f"ends with status 0 and other numbers or files: {wrong[:5]}" if wrong else ""
