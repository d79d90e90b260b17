"""The index of a study on disk: which runs it has, on which questions, so that its report needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bmoe_lightning.utils.file_header import damaged
from bmoe_lightning.utils.json_io import read_json_file, write_json_file
from recipes.paper.outcomes import MODES, Outcome, Study
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.stored_predictions import read_predictions
from recipes.qwen_obqa.zero_shot import ZERO_SHOT

STUDY_FILE = "study.json"
_FORMAT = "study"
_VERSION = 1
_REMEDY = "run the command that made it again, which repeats no finished run"


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


def write_study(output: Path, study: Study, outcomes: Sequence[StoredOutcome]) -> None:
    """Write the index of a study atomically.

    Args:
        output: Folder of the study.
        study: The study; its outcomes are not written.
        outcomes: Where its predictions are.
    """
    content: dict[str, Any] = {
        "preset": study.preset,
        "model": study.model,
        "home": study.home,
        "labels": study.labels,
        "tables": list(study.tables),
        "figures": list(study.figures),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    write_json_file(output / STUDY_FILE, format=_FORMAT, version=_VERSION, description=content)


def read_study(output: Path) -> Study:
    """Read a study and all its predictions.

    Args:
        output: Folder of the study.

    Raises:
        FileNotFoundError: If there is no study, or predictions are missing.
        ValueError: If a file is damaged.
    """
    path = output / STUDY_FILE
    content = read_json_file(path, format=_FORMAT, version=_VERSION, remedy=_REMEDY).description
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
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(path, _FORMAT, f"it is incomplete ({error!r})", _REMEDY) from error


def _read_outcome(output: Path, stored: StoredOutcome) -> Outcome:
    (mode,) = (mode for mode in MODES if mode == stored.mode)
    results = tuple(
        read_predictions(output / folder / f"{name}.safetensors", name, label, int(seed), tuple(stored.ids))
        for name, label in stored.methods.items()
        for seed, folder in stored.folders.items()
    )
    return Outcome(stored.trained_on, mode, stored.tested_on, results)
