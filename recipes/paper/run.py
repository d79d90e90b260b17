"""All runs of a study, several at a time where that is faster, and its report."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bmoe_lightning.methods import Method
from bmoe_lightning.utils.distributed import is_rank_zero
from recipes.common.errors import RecipeError
from recipes.common.jobs import Job, jobs_at_a_time, run_jobs
from recipes.common.study_settings import StudySettings
from recipes.paper.attribution import make_attribution, read_attribution
from recipes.paper.costs import measure_costs, outstanding_costs
from recipes.paper.outcomes import Mode, Study
from recipes.paper.plan import Columns, PlannedRun, planned_runs
from recipes.paper.presets import Preset, chosen_preset
from recipes.paper.report import Attributed, write_report
from recipes.paper.settings import PaperSettings
from recipes.paper.sources import Questions, load_study_questions, num_expert_layers, pretrained_model, source_of
from recipes.paper.stored_costs import reported_costs
from recipes.paper.stored_study import StoredOutcome, begin_study, read_study, stored_outcomes, write_study
from recipes.paper.worker import worker_arguments
from recipes.qwen_obqa.distributed import first_then_others, joined
from recipes.qwen_obqa.experiment import completed_run, quieten
from recipes.qwen_obqa.hashes import stored_run_hashes
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.run_folder import locked_output, plain_notes
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.settings import ResolvedSettings, Settings
from recipes.qwen_obqa.sources import Source

_MODELS = "model"


def run(settings: PaperSettings) -> None:
    """Make all runs that the tables and figures need, and their report.

    Runs that are found in the output folder are resumed, and finished ones are not repeated.

    Args:
        settings: Settings.

    Raises:
        UsageError: If the settings exclude each other.
        RecipeError: If model or data cannot be loaded, or a folder holds another study.
    """
    started, output = time.monotonic(), Path(settings.output_dir)
    with plain_notes(), joined(Settings(accelerator=settings.accelerator, strategy=settings.strategy).resolved()):
        quieten()
        study = _planned(settings)
        with locked_output(output):
            described = study.described(settings)
            first_then_others(lambda: begin_study(output, described, overwrite=settings.overwrite))
            at_a_time = jobs_at_a_time(settings.jobs, settings.accelerator, small=study.preset.model is None)
            if at_a_time > 1:
                _run_in_processes(settings, study, at_a_time)
                study = study.resumed()  # what the processes have made is not replaced
            outcomes: list[StoredOutcome] = []
            hashes: dict[str, Any] = {}
            measured: dict[Mode, SeedRun] = {}
            announce = at_a_time == 1
            for number, entry in enumerate(study.runs, 1):
                if is_rank_zero() and announce:
                    print(f"\n[{number} of {len(study.runs)}] {entry.name}", flush=True)
                with study.completed(entry, announce=announce) as seeds:
                    outcomes += stored_outcomes(output, entry.data, entry.mode, seeds)
                    if is_rank_zero():
                        hashes[entry.name] = stored_run_hashes(seeds)
                    if entry.data == study.home:
                        measured[entry.mode] = seeds[0]
            if not is_rank_zero():
                return
            write_study(output, described, outcomes, hashes)
            if "experts" in measured:
                make_attribution(output, measured["experts"])
            outstanding = outstanding_costs(output, measured)
            written = report(output)
            if outstanding:  # after a report without them, so that an error or a signal leaves a finished study one
                print(f"\nThe report is in {written}; it is completed with what each method costs.", flush=True)
                measure_costs(output, measured, outstanding)
                written = report(output)
            print(written.read_text(encoding="utf-8"), flush=True)
            print(f"\nDone in {time.monotonic() - started:.0f} s. Everything is in {output}.", flush=True)


def complete_one(settings: PaperSettings, name: str) -> None:
    """Complete one run of a study, without its report.

    Args:
        settings: Settings of the study.
        name: Name of the run.

    Raises:
        RecipeError: As `run`.
    """
    with plain_notes():
        quieten()
        study = _planned(settings)
        (entry,) = (entry for entry in study.runs if entry.name == name)
        with study.completed(entry):
            pass


def pretrain_one(settings: PaperSettings, seed: int) -> None:
    """Pre-train the small models of all runs, unless they are there.

    Args:
        settings: Settings of the study.
        seed: Seed of the pre-training.

    Raises:
        RecipeError: If the questions cannot be loaded.
    """
    with plain_notes():
        study = _planned(settings)
        for of_run in study.settings.values():
            if (model := pretrained_model(of_run, study.questions, study.output / _MODELS)) is not None:
                model.folder(seed, progress=False)


@dataclass(frozen=True)
class _Planned:
    """A study before it is run."""

    preset: Preset
    questions: Questions
    runs: list[PlannedRun]
    settings: dict[str, ResolvedSettings]
    output: Path

    @property
    def home(self) -> str:
        """The data set whose models are tested on all others."""
        return next(iter(self.questions.data))

    @contextlib.contextmanager
    def completed(self, entry: PlannedRun, *, announce: bool = True) -> Iterator[list[SeedRun]]:
        """The completed runs of all seeds of one model."""

        def prepare(settings: ResolvedSettings, methods: Sequence[Method]) -> Source:
            return source_of(entry, self.questions, self.output / _MODELS, settings, methods)

        with completed_run(self.settings[entry.name], prepare, announce=announce) as seeds:
            yield seeds

    def resumed(self) -> _Planned:
        """The same study, whose runs are resumed where they are found."""
        return replace(self, settings={name: replace(found, overwrite=False) for name, found in self.settings.items()})

    def described(self, settings: PaperSettings) -> Study:
        """The study without outcomes."""
        labels = {entry.name: entry.label for entry in self.preset.data}
        asked = (settings.tables, settings.figures)
        model = f"DRY RUN, the numbers mean nothing: {self.preset.label}" if settings.dry_run else self.preset.label
        return Study(settings.preset, model, self.home, labels, *asked, outcomes=())


def _planned(settings: PaperSettings) -> _Planned:
    preset = chosen_preset(settings)
    questions = load_study_questions(preset)
    columns = Columns(tuple(questions.data), num_expert_layers(preset, dry_run=settings.dry_run))
    runs = planned_runs(settings, columns)
    of_runs = {entry.name: run_settings(entry, preset, settings, questions) for entry in runs}
    for of_run in of_runs.values():
        build_methods(of_run)  # raises now what would stop a run later
    return _Planned(preset, questions, runs, of_runs, Path(settings.output_dir))


def _run_in_processes(settings: PaperSettings, study: _Planned, at_a_time: int) -> None:
    """Complete all runs, several at a time."""
    logs, first = study.output / "logs", next(iter(study.settings.values()))
    models, runs = [], []
    if first.kind != "full" and not first.dry_run:
        for seed in range(first.first_seed, first.first_seed + first.seeds):
            arguments = worker_arguments(settings, seed=seed)
            models.append(Job(f"pre-training, seed {seed}", arguments, logs / f"pretraining-{seed}.log"))
    for entry in study.runs:
        runs.append(Job(entry.name, worker_arguments(settings, run=entry.name), logs / f"{entry.name}.log"))
    # All runs need the models, of which two processes would train the same.
    run_jobs(models, at_a_time)
    run_jobs(runs, at_a_time)


def report(output: Path) -> Path:
    """Make the report of a finished study from its stored predictions, and return the path of its text.

    Args:
        output: Folder of the study.

    Raises:
        RecipeError: If there is no study, or a file is missing or damaged.
    """
    try:
        study = read_study(output)
    except (FileNotFoundError, ValueError) as error:
        raise RecipeError(str(error)) from error
    return write_report(output / "report", study, costs=reported_costs(output), attribution=_attribution(output))[0]


def _attribution(output: Path) -> Attributed | None:
    """The stored attribution; None for a file that cannot be read, since the report of the predictions needs none."""
    try:
        return read_attribution(output)
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
        return None


def run_settings(
    planned: PlannedRun, preset: Preset, settings: PaperSettings, questions: Questions
) -> ResolvedSettings:
    """The settings of the main job for one run.

    Args:
        planned: The run.
        preset: Preset.
        settings: Settings of the study.
        questions: Questions of all data sets.
    """
    own: dict[str, Any] = {"strategy": settings.strategy}
    if planned.mode == "lora":  # whose model is the same before fine-tuning
        own |= {"learning_rate": settings.lora_learning_rate, "zero_shot": False}
    else:
        own["zero_shot"] = settings.zero_shot
    return settings_of_run(planned, preset, settings, questions, own)


def settings_of_run(
    planned: PlannedRun,
    preset: Preset,
    settings: StudySettings,
    questions: Questions,
    own: Mapping[str, Any] = MappingProxyType({}),
) -> ResolvedSettings:
    """The settings of the main job for one run of any study.

    Args:
        planned: The run.
        preset: Preset.
        settings: Settings of the study.
        questions: Questions of all data sets.
        own: Options of the run that go before those of the study; None for the preset's.
    """
    entry = questions.data[planned.data]
    given = {name: value for name, value in {**settings.given(), **own}.items() if value is not None}
    options = {**preset.run_options(planned.mode), **given}
    return Settings(
        model=preset.model,
        data=entry.source,
        prompt=options.pop("prompt", entry.prompt),
        methods=planned.methods,
        output_dir=str(Path(settings.output_dir) / "runs" / planned.name),
        seeds=settings.seeds or preset.seeds,
        **settings.common(),
        **options,
    ).resolved()
