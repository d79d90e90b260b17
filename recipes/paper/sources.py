"""Model and questions of each run of a study."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bmoe_lightning.data import DataUnavailableError
from bmoe_lightning.data.duplicates import leave_out
from bmoe_lightning.data.questions import Question, Splits
from bmoe_lightning.data.splits import load_splits
from bmoe_lightning.experts import find_expert_layers
from bmoe_lightning.methods import Method
from bmoe_lightning.models.loading import ModelUnavailableError
from recipes.common.errors import RecipeError
from recipes.paper.generated import WORLD, generated_set
from recipes.paper.plan import PlannedRun
from recipes.paper.presets import DataSet, Preset
from recipes.plan.architecture import build, load_configuration
from recipes.qwen_obqa.builtin_model import SmallModel, small_moe_config
from recipes.qwen_obqa.settings import ResolvedSettings, default_prompt
from recipes.qwen_obqa.sources import (
    OtherSet,
    PretrainedBySeed,
    Source,
    check_model,
    limited,
    limited_test,
    reader,
)

_LAYERS = 4
"""Expert layers of the small model: quarters of them are whole layers."""


@dataclass(frozen=True)
class Questions:
    """The questions of all data sets of a study.

    Attributes:
        data: The data sets by name.
        splits: Their splits by name; a test question of one is in no other part of any.
        pretraining: Training questions of all data sets that calibrate and test none, on which the small model is
            pre-trained for real data.
    """

    data: Mapping[str, DataSet]
    splits: Mapping[str, Splits]
    pretraining: tuple[Question, ...]


def load_study_questions(preset: Preset) -> Questions:
    """Generate or load the questions of all data sets.

    Data sets may share questions. A model that is trained on one is tested on others, so what any of them tests is left
    out of the training and calibration parts of all. Generated data sets have each fact in one split already.

    Args:
        preset: Preset with its data sets.

    Raises:
        RecipeError: If a data set cannot be loaded or is malformed, or nothing is left of a part.

    Warns:
        UserWarning: If questions were left out: one sentence with their numbers.
    """
    try:
        splits = {entry.name: _splits(entry) for entry in preset.data}
        if all(entry.source is None for entry in preset.data):
            pool = tuple(question for found in splits.values() for question in found.train)
        else:
            splits, pool = _disjoint(splits, pretrains=preset.model is None)
    except (DataUnavailableError, FileNotFoundError, ValueError) as error:
        raise RecipeError(str(error)) from error
    return Questions({entry.name: entry for entry in preset.data}, splits, pool)


def _disjoint(given: Mapping[str, Splits], *, pretrains: bool) -> tuple[dict[str, Splits], tuple[Question, ...]]:
    """The splits without questions that another data set tests, and those of train that calibrate none either."""
    splits, told, pool = dict[str, Splits](), list[str](), list[Question]()
    for name, own in given.items():
        tested = [question for other in given if other != name for question in given[other].test]
        train, trained = leave_out(own.train, tested, f"{name} train", "test part of another data set")
        calibration, calibrated = leave_out(
            own.calibration, tested, f"{name} calibration", "test part of another data set"
        )
        for part, remaining in (("train", train), ("calibration", calibration)):
            if not remaining:
                raise ValueError(
                    f"all {part} questions of {name} are test questions of another data set; leave one of them out"
                )
        splits[name] = replace(own, train=train, calibration=calibration)
        told += [clause for clause in (trained, calibrated) if clause]
    notes = [f"{', and '.join(told)}; they were left out"] if told else []
    told = []
    calibrating = [question for found in splits.values() for question in found.calibration]
    for name, own in splits.items():
        train, clause = leave_out(own.train, calibrating, f"{name} train", "calibration part of a data set")
        pool += train
        told += [clause] if clause else []
    if pretrains and not pool:
        raise ValueError("all train questions are calibration questions of a data set; leave one of them out")
    if pretrains and told:
        notes.append(f"{', and '.join(told)}; the small model is not pre-trained on them")
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=3)
    return splits, tuple(pool)


def _splits(entry: DataSet) -> Splits:
    if entry.source is None:
        return generated_set(entry.name).splits()
    return load_splits(entry.source, entry.protocol or "paper", task=entry.task)


def num_expert_layers(preset: Preset, *, dry_run: bool) -> int:
    """The number of expert layers of a preset's model, from its configuration alone.

    Args:
        preset: Preset.
        dry_run: Whether the small model is replaced by one with random weights.

    Raises:
        RecipeError: If the model cannot be loaded, or has no experts.
    """
    if preset.model is None:
        generated = all(entry.source is None for entry in preset.data) and not dry_run
        return _LAYERS if generated else small_moe_config(1).num_hidden_layers
    try:
        check_model(preset.model)
        return len(find_expert_layers(build(load_configuration(preset.model), torch.float32)))
    except (ModelUnavailableError, ValueError) as error:
        raise RecipeError(str(error)) from error


@dataclass(frozen=True)
class Reader:
    """The small model for real data, pre-trained on questions once for each seed.

    Attributes:
        settings: Settings of a run.
        questions: Questions whose text is learnt.
        parent: Parent of its checkpoints.
    """

    settings: ResolvedSettings
    questions: tuple[Question, ...]
    parent: Path

    def folder(self, seed: int, *, progress: bool = True) -> Path:
        """The checkpoint of a seed; see `reader`.

        Args:
            seed: Seed of the pre-training.
            progress: Whether to show a progress bar.
        """
        return Path(reader(replace(self.settings, quiet=not progress), self.questions, self.parent, seed=seed))


def pretrained_model(settings: ResolvedSettings, questions: Questions, model_folder: Path) -> PretrainedBySeed | None:
    """The small model that a run fine-tunes; None for a given one.

    Args:
        settings: Settings of the run.
        questions: Questions of all data sets.
        model_folder: Folder of the small models.
    """
    if settings.model is not None:
        return None
    if settings.data is None and not settings.dry_run:
        return SmallModel(WORLD, model_folder, _LAYERS)
    return Reader(settings, questions.pretraining, model_folder)


def source_of(
    run: PlannedRun, questions: Questions, model_folder: Path, settings: ResolvedSettings, methods: Sequence[Method]
) -> Source:
    """Model and questions of one run.

    Args:
        run: The run.
        questions: Questions of all data sets.
        model_folder: Folder of the small models, which all runs share.
        settings: Settings of the run.
        methods: Methods of the run.

    Raises:
        RecipeError: If the questions are too few for a method, or model and questions do not fit.
    """
    splits = questions.splits[run.data]
    try:
        drawn = limited(settings, splits, methods)
        small, model = pretrained_model(settings, questions, model_folder), settings.model or ""
        if small is not None:
            model = str(small.folder(settings.first_seed, progress=not settings.quiet))
        source = Source(
            settings,
            model,
            model,
            drawn.train,
            drawn.calibration,
            drawn.test,
            banner=f"{run.name}: {len(drawn.train)} training, {len(drawn.calibration)} calibration and "
            f"{len(drawn.test)} test questions",
            small_model=small,
            others={name: _other(questions, name, settings, methods) for name in run.others},
            calibration_in_train=drawn.calibration_in_train,
        )
        # These raise now, and not after the training, if the tokenizer or the prompts do not fit.
        source.data(seed=0)
        for name in source.others:
            source.data_of(name)
    except (DataUnavailableError, ModelUnavailableError, ValueError, RuntimeError) as error:
        raise RecipeError(str(error)) from error
    return source


def _other(questions: Questions, name: str, settings: ResolvedSettings, methods: Sequence[Method]) -> OtherSet:
    """A data set that the run is only tested on, asked as a run that is trained on it asks it."""
    splits = questions.splits[name]
    test = limited_test(settings, splits.test, methods)
    return OtherSet(replace(splits, test=test), questions.data[name].prompt or default_prompt(settings.kind))
