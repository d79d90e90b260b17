"""All runs of a study, one after another, and its report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bmoe_lightning.methods import Method
from bmoe_lightning.utils.distributed import is_rank_zero
from bmoe_lightning.utils.folder_lock import FolderInUseError, locked_folder
from recipes.paper.outcomes import Study
from recipes.paper.plan import Columns, PlannedRun, planned_runs
from recipes.paper.presets import Preset, chosen_preset
from recipes.paper.settings import PaperSettings
from recipes.paper.sources import Questions, load_study_questions, num_expert_layers, source_of
from recipes.paper.stored_study import StoredOutcome, read_study, stored_outcomes, write_study
from recipes.qwen_obqa.distributed import joined
from recipes.qwen_obqa.experiment import completed_run, quieten
from recipes.qwen_obqa.run_folder import make_folder, plain_notes
from recipes.qwen_obqa.settings import ResolvedSettings, Settings
from recipes.qwen_obqa.sources import RecipeError, Source


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
    preset = chosen_preset(settings)
    with plain_notes(), joined(Settings(accelerator=settings.accelerator, strategy=settings.strategy).resolved()):
        quieten()
        questions = load_study_questions(preset)
        columns = Columns(tuple(questions.data), num_expert_layers(preset, dry_run=settings.dry_run))
        planned = planned_runs(settings, columns)
        runs = {entry.name: run_settings(entry, preset, settings, questions) for entry in planned}
        with _locked(output):
            outcomes: list[StoredOutcome] = []
            for number, entry in enumerate(planned, 1):
                if is_rank_zero():
                    print(f"\n[{number} of {len(planned)}] {entry.name}", flush=True)
                outcomes += _completed(entry, runs[entry.name], questions, output)
            if not is_rank_zero():
                return
            labels = {entry.name: entry.label for entry in preset.data}
            asked = (settings.tables, settings.figures)
            study = Study(settings.preset, preset.label, columns.home, labels, *asked, outcomes=())
            write_study(output, study, outcomes)
            report(output)
            print(f"\nDone in {time.monotonic() - started:.0f} s. Everything is in {output}.", flush=True)


def report(output: Path) -> None:
    """Make the report of a finished study from its stored predictions, and print it.

    Args:
        output: Folder of the study.

    Raises:
        RecipeError: If there is no study, or a file is missing or damaged.
    """
    from recipes.paper.report import write_report

    try:
        study = read_study(output)
    except FileNotFoundError as error:
        raise RecipeError(f"{output} holds no finished study ({error}); make it first, without --report") from None
    except ValueError as error:
        raise RecipeError(str(error)) from error
    print(write_report(output / "report", study)[0].read_text(encoding="utf-8"), flush=True)


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
    entry = questions.data[planned.data]
    given: dict[str, Any] = {
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "eval_batch_size": settings.eval_batch_size,
    }
    options = {**preset.run_options(planned.mode), **{name: value for name, value in given.items() if value}}
    return Settings(
        model=preset.model,
        data=entry.source,
        prompt=options.pop("prompt", entry.prompt),
        methods=planned.methods,
        output_dir=str(Path(settings.output_dir) / "runs" / planned.name),
        seeds=settings.seeds or preset.seeds,
        first_seed=settings.first_seed,
        limit=settings.limit,
        limit_test=settings.limit_test,
        dry_run=settings.dry_run,
        quiet=settings.quiet,
        accelerator=settings.accelerator,
        strategy=settings.strategy,
        zero_shot=False,
        **options,
    ).resolved()


def _completed(
    planned: PlannedRun, settings: ResolvedSettings, questions: Questions, output: Path
) -> list[StoredOutcome]:
    def prepare(settings: ResolvedSettings, methods: Sequence[Method]) -> Source:
        return source_of(planned, questions, output / "model", settings, methods)

    with completed_run(settings, prepare) as runs:
        return stored_outcomes(output, planned.data, planned.mode, runs)


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if is_rank_zero():
            make_folder(output)
            try:
                stack.enter_context(locked_folder(output))
            except FolderInUseError as error:
                raise RecipeError(f"{error}, or give another --output-dir") from None
        yield
