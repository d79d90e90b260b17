"""Mutate a file that the project has written, and read it again: refused in a sentence that names it, or no change."""

from __future__ import annotations

import random
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bmoe_lightning.laplace import WeightMismatchError
from bmoe_lightning.methods import FitResult, Method, NotFittedError
from bmoe_lightning.models.loading import ModelUnavailableError
from bmoe_lightning.utils.file_contract import same_content
from recipes.faults.mutations import ALL, mutation
from recipes.faults.outcomes import Outcome
from recipes.faults.trials import Step

_REFUSALS = (ValueError, OSError, NotFittedError, WeightMismatchError, ModelUnavailableError)
_NAMES = (
    ("index", "index"),
    ("posterior", "posterior"),
    ("methods-", "states of methods"),
    ("state-", "states of methods"),
    ("curvature", "sums of a curvature pass"),
    ("calibrated_model", "manifest"),
    ("trained", "trained weights"),
    ("model", "model"),
    ("run", "description of the run"),
)


@dataclass(frozen=True)
class Part:
    """Files that are read together.

    Attributes:
        name: What they are, for the table.
        folder: Folder with all of them.
        read: Reads a copy of the folder, and returns what is compared.
        chosen: Patterns of the files that are mutated.
        other: Folder of the same kind with other content, whose files may be put in their place.
        kinds: Kinds of mutations, each as often as it is drawn.
        further: Further checks that need no random choice.
    """

    name: str
    folder: Path
    read: Callable[[Path], Any]
    chosen: tuple[str, ...] = ("**/*",)
    other: Path | None = None
    kinds: tuple[str, ...] = ALL
    further: Callable[[], list[Outcome]] = list

    def files(self, folder: Path) -> list[Path]:
        """The files of a copy of the folder that may be mutated."""
        found = {path for pattern in self.chosen for path in folder.glob(pattern)}
        return sorted(path for path in found if path.is_file() and path.stat().st_size)

    def mates(self, path: Path) -> list[Path]:
        """Files that may be put in the place of one."""
        if self.other is None:
            return []
        if "epoch" in path.name:
            return [mate for mate in path.parent.glob("*epoch*") if mate != path] + list(self.other.rglob("*epoch*"))
        found = self.other.rglob(f"*{path.suffix}")
        return [mate for mate in found if mate.name[:6] == path.name[:6] or "epoch" in mate.name]


def mutated(part: Part, count: int, rng: random.Random, advance: Step, scratch: Path) -> list[Outcome]:
    """Mutate files and read them.

    Args:
        part: The files.
        count: Number of mutations.
        rng: Source of all choices.
        advance: Called after each.
        scratch: Folder for copies, created and removed.

    Returns:
        What came of them, by kind of file.
    """
    outcomes: dict[str, Outcome] = {}
    before = _read(part, _copied(part.folder, scratch))
    tried = 0
    while tried < count:
        work = _copied(part.folder, scratch)
        path = drawn(part.files(work), rng)
        change = mutation(path, rng, part.kinds, part.mates)
        if change is None:
            continue
        change.apply(path, work)
        tried += 1
        kind = f"{part.name}: {kind_of(path)}"
        outcome, fault = _outcome(part, work, before)
        place = f"{path.relative_to(work)}, {change.name}"
        outcomes.setdefault(kind, Outcome(kind)).add(outcome, fault and f"{place}: {fault}")
        advance(f"{part.name}, {tried} of {count}")
    shutil.rmtree(scratch, ignore_errors=True)
    return [outcomes[kind] for kind in sorted(outcomes)]


def checked_states(methods: Sequence[Method], fit: FitResult) -> Outcome:
    """Take each value of each method's state away, or give it another name, and have the method check the rest.

    Args:
        methods: Methods.
        fit: Fit of all of them.
    """
    outcome = Outcome("fit: names of a method's values")
    for method in methods:
        state = fit.state_of(method)
        for name in state:
            rest = {key: value for key, value in state.items() if key != name}
            for kind, changed in (("removed", rest), ("renamed", {**rest, f"{name}x": state[name]})):
                try:
                    method.check_state(changed)
                except ValueError:
                    outcome.add("refused")
                except Exception as error:  # noqa: BLE001  # that is what is counted
                    outcome.add("", f"{kind} {method.name}/{name}: no sentence: {error!r}")
    return outcome


def _outcome(part: Part, work: Path, before: Any) -> tuple[str, str]:
    """The outcome, and what was not handled."""
    try:
        found = _read(part, work)
    except _REFUSALS as error:
        # A comparison with the model's weights has no file to name.
        if str(work) in str(error) or isinstance(error, (NotFittedError, WeightMismatchError)):
            return "refused", ""
        return "", f"refused without its path: {error!r}"
    except Exception as error:  # noqa: BLE001  # that is what is counted
        return "", f"no sentence: {error!r}"
    return ("no effect", "") if same_content(found, before) else ("", "accepted, with other numbers")


def _read(part: Part, folder: Path) -> Any:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return part.read(folder)


def _copied(folder: Path, scratch: Path) -> Path:
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(folder, scratch)
    return scratch


def drawn(paths: Sequence[Path], rng: random.Random) -> Path:
    """A file: first its kind is drawn, since there are many files of some kinds.

    Args:
        paths: The files.
        rng: Source of both choices.
    """
    kind = rng.choice(sorted({kind_of(path) for path in paths}))
    return rng.choice([path for path in paths if kind_of(path) == kind])


def kind_of(path: Path) -> str:
    """What a file is, for the table."""
    if "epoch" in path.name:
        return "snapshot"
    if path.parent.name == "predictions":
        return "predictions"
    return next((kind for name, kind in _NAMES if path.name.startswith(name)), "files of the model")
