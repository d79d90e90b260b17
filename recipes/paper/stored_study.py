"""The index of a study on disk: which runs it has, on which questions, so that its report needs no model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bmoe_lightning.report import MethodResult, library_versions
from bmoe_lightning.utils.file_header import damaged
from bmoe_lightning.utils.json_io import read_json_file, write_json_file
from recipes.common.errors import RecipeError
from recipes.paper.outcomes import MODES, Outcome, Study
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.stored_predictions import read_predictions
from recipes.qwen_obqa.zero_shot import ZERO_SHOT

STUDY_FILE = "study.json"
_FORMAT = "study"
_VERSION = 1
_REMEDY = "run the command that made it again, which repeats no finished run"
# What fixes a study, with the words for it; the description of each run fixes its settings. Tables may be added.
_FIXED = {"preset": "preset", "model": "model", "home": "first data set"}


@dataclass(frozen=True)
class StoredOutcome:
    """Where the predictions of one outcome are.

    Attributes:
        trained_on: Name of the data set of the training.
        mode: What was fine-tuned.
        tested_on: Name of the data set whose test questions were answered.
        folders: Folder of the predictions of each seed, relative to the study's, by the seed as text.
        methods: Display names by the name of the method, in the order of the table.
        ids: Ids of the questions, in order.
    """

    trained_on: str
    mode: str
    tested_on: str
    folders: dict[str, str]
    methods: dict[str, str]
    ids: list[str]


def stored_outcomes(output: Path, trained_on: str, mode: str, runs: Sequence[SeedRun]) -> list[StoredOutcome]:
    """Describe what the completed runs of one model have predicted; last, if they have it, before fine-tuning.

    Args:
        output: Folder of the study.
        trained_on: Name of the data set of the training.
        mode: What was fine-tuned.
        runs: The runs of all seeds.
    """
    methods, source = {method.name: method.label for method in runs[0].methods}, runs[0].source
    folders = {trained_on: {run.seed: run.predictions.folder for run in runs}}
    tested = {trained_on: source.test}
    for name, other in source.others.items():
        folders[name] = {run.seed: run.predictions_of(name).folder for run in runs}
        tested[name] = other.splits.test

    def described(tested_on: str, of_seeds: Mapping[int, Path], labels: dict[str, str]) -> StoredOutcome:
        found = {str(seed): folder.relative_to(output).as_posix() for seed, folder in of_seeds.items()}
        return StoredOutcome(
            trained_on, mode, tested_on, found, labels, [question.id for question in tested[tested_on]]
        )

    outcomes = [described(tested_on, of_seeds, methods) for tested_on, of_seeds in folders.items()]
    if runs[0].settings.zero_shot:
        before = {run.seed: run.zero_shot_predictions.folder for run in runs}
        outcomes.append(described(trained_on, before, {ZERO_SHOT.name: ZERO_SHOT.label}))
    return outcomes


def begin_study(output: Path, study: Study, *, overwrite: bool) -> None:
    """Refuse a folder that holds another study; in a new one the index is written, without outcomes as yet.

    Args:
        output: Folder of the study.
        study: The study to make.
        overwrite: Whether it replaces another one.

    Raises:
        RecipeError: If the folder holds a study of another preset, model or first data set, and `overwrite` is not set.

    Warns:
        UserWarning: If the index of an earlier study is damaged; it is then written again.
    """
    path, wanted = output / STUDY_FILE, _description(study, ())
    try:
        earlier = read_json_file(path, format=_FORMAT, version=_VERSION, remedy=_REMEDY).description
    except FileNotFoundError:
        earlier = {}
    except ValueError as error:
        warnings.warn(f"{error} It is written again", stacklevel=2)
        earlier = {}
    differing = [name for name in _FIXED if earlier.get(name) != wanted[name]]
    if earlier and differing and not overwrite:
        had = ", ".join(f"{_FIXED[name]} {earlier.get(name)!r} (here {wanted[name]!r})" for name in differing)
        raise RecipeError(
            f"{output} holds another study: {had}; give another --output-dir, or --overwrite to replace that study"
        )
    if differing:
        write_study(output, study, ())


def write_study(
    output: Path, study: Study, outcomes: Sequence[StoredOutcome], hashes: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Write the index of a study atomically, with the versions of the libraries.

    Args:
        output: Folder of the study.
        study: The study; its outcomes are not written.
        outcomes: Where its predictions are.
        hashes: Digests of what each run's numbers were made from, by the name of the run.
    """
    description = _description(study, outcomes) | {"versions": library_versions(), "hashes": dict(hashes)}
    write_json_file(output / STUDY_FILE, format=_FORMAT, version=_VERSION, description=description)


def _description(study: Study, outcomes: Sequence[StoredOutcome]) -> dict[str, Any]:
    return {
        "preset": study.preset,
        "model": study.model,
        "home": study.home,
        "labels": study.labels,
        "tables": list(study.tables),
        "figures": list(study.figures),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def read_study(output: Path) -> Study:
    """Read a study and all its predictions.

    Args:
        output: Folder of the study.

    Raises:
        FileNotFoundError: If there is no finished study, or predictions are missing.
        ValueError: If a file is damaged.
    """
    path = output / STUDY_FILE
    unfinished = f"{output} holds no finished study; check the path, or make the study first"
    try:
        content = read_json_file(path, format=_FORMAT, version=_VERSION, remedy=_REMEDY).description
    except FileNotFoundError as error:
        raise FileNotFoundError(unfinished) from error
    if content.get("outcomes") == []:
        raise FileNotFoundError(unfinished)
    try:
        stored = [StoredOutcome(**entry) for entry in content["outcomes"]]
        outcomes = [_read_outcome(output, entry) for entry in stored]
        return Study(
            content["preset"],
            content["model"],
            content["home"],
            dict(content["labels"]),
            tuple(content["tables"]),
            tuple(content["figures"]),
            tuple(outcomes),
            dict(content.get("versions", {})),
            dict(content.get("hashes", {})),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(path, _FORMAT, f"it is incomplete ({error!r})", _REMEDY) from error


def _read_outcome(output: Path, stored: StoredOutcome) -> Outcome:
    (mode,) = (mode for mode in MODES if mode == stored.mode)
    results = tuple(
        _read_result(output / folder / f"{name}.safetensors", name, label, int(seed), tuple(stored.ids))
        for name, label in stored.methods.items()
        for seed, folder in stored.folders.items()
    )
    return Outcome(stored.trained_on, mode, stored.tested_on, results)


def _read_result(path: Path, name: str, label: str, seed: int, ids: tuple[str, ...]) -> MethodResult:
    try:
        return read_predictions(path, name, label, seed, ids)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there are no predictions at {path}, which {STUDY_FILE} of the study names; {_REMEDY}"
        ) from error
