"""All stages of a study of routers, and its report."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from bmoe_lightning.utils.distributed import num_processes
from recipes.common.errors import RecipeError
from recipes.common.jobs import Job, jobs_at_a_time, run_jobs
from recipes.paper.costs import measure_costs, outstanding_costs
from recipes.paper.outcomes import Mode
from recipes.paper.stored_costs import reported_costs
from recipes.paper.stored_study import begin_study, read_study, write_study
from recipes.qwen_obqa.experiment import quieten
from recipes.qwen_obqa.hashes import data_hashes, stored_run_hashes
from recipes.qwen_obqa.run_folder import locked_output, plain_notes
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.routers.gates import TrainedGates
from recipes.routers.measures import read_stability
from recipes.routers.planned import PlannedStudy, plan_study
from recipes.routers.report import RouterReport, write_report
from recipes.routers.settings import RouterSettings
from recipes.routers.stored_routes import read_routes
from recipes.routers.worker import Step, worker_arguments


def run(settings: RouterSettings) -> None:
    """Train, fit and test all methods, measure the stability of routes, and make the report.

    Stages that are found in the output folder are not repeated.

    Args:
        settings: Settings.

    Raises:
        UsageError: If the settings exclude each other.
        RecipeError: If model or data cannot be loaded, or the folder holds another study.
    """
    started, output = time.monotonic(), Path(settings.output_dir)
    if num_processes() > 1:
        raise RecipeError("the stability of routes is measured in one process; run this study without torchrun")
    with plain_notes():
        quieten()
        study = plan_study(settings)
        with locked_output(output):
            begin_study(output, study.described(), overwrite=settings.overwrite)
            _run_in_processes(study, *_first_steps(study))
            resumed = study if _jobs(study) == 1 else study.resumed()  # what the processes made is not replaced
            with resumed.completed(study.entries, study.others) as seeds:
                study.measure(seeds)  # on calibration questions too, which choose layers
                shifted = [found for found in study.outcomes(seeds) if found.tested_on != study.home]
                data = data_hashes(seeds[0].source)
                measured: dict[Mode, SeedRun] = {"experts": _with_costs(seeds[0])}
            _run_in_processes(study.resumed(), "some_layers")
            with study.resumed().completed([*study.entries, *study.of_layers(study.selected())]) as seeds:
                hashes = {f"{study.home}-experts": {**stored_run_hashes(seeds), "data": data}}
                write_study(output, study.described(), [*study.outcomes(seeds), *shifted], hashes)
                study.write(seeds)
                outstanding = outstanding_costs(output, measured)
                if outstanding:
                    measure_costs(output, measured, outstanding)
            written = report(output)
            print(written.read_text(encoding="utf-8"), flush=True)
            print(f"\nDone in {time.monotonic() - started:.0f} s. Everything is in {output}.", flush=True)


def complete_seed(settings: RouterSettings, seed: int, step: Step) -> None:
    """Do one step of the run of a seed.

    Args:
        settings: Settings of the study.
        seed: The seed.
        step: The step.

    Raises:
        RecipeError: As `run`.
    """
    with plain_notes():
        quieten()
        study = plan_study(settings)
        if step == "pretraining":
            study.pretrain(seed)
        elif step == "home":
            with study.completed(study.entries, seeds=[seed]):
                pass
        elif step == "all_layers":
            with study.completed(study.entries, study.others, [seed]) as runs:
                study.measure(runs)
        else:
            with study.completed([*study.entries, *study.of_layers(study.selected())], seeds=[seed]):
                pass


_TOLD: dict[Step, str] = {
    "pretraining": "pre-training",
    "home": "fine-tuning and fits",
    "all_layers": "distribution shift and stability",
    "some_layers": "routers of some layers",
}


def _first_steps(study: PlannedStudy) -> tuple[Step, ...]:
    """The steps before it is known which layers are compared with all."""
    return ("home", "all_layers") if study.preset.model is not None else ("pretraining", "home", "all_layers")


def _jobs(study: PlannedStudy) -> int:
    """Number of seeds at a time."""
    settings, small = study.settings, study.preset.model is None
    return min(len(study.seeds), jobs_at_a_time(settings.jobs, settings.accelerator, small=small))


def _run_in_processes(study: PlannedStudy, *steps: Step) -> None:
    """Do steps of the runs of all seeds, several at a time; nothing where the study runs one at a time.

    Jobs are in the order of the steps, so that no seed with all its steps is left for the end.
    """
    at_a_time = _jobs(study)
    if at_a_time == 1:
        return
    resumed, jobs, before = study.resumed(), list[Job](), dict[int, str]()
    for step in steps:
        for seed in study.seeds:
            # What an earlier step has made is not replaced.
            settings = (study if step == "home" else resumed).settings
            name, log = f"seed {seed}, {_TOLD[step]}", study.output / "logs" / f"{step}-{seed}.log"
            jobs.append(Job(name, worker_arguments(settings, seed, step), log, before.get(seed)))
            before[seed] = name
    run_jobs(jobs, at_a_time)


def _with_costs(run_of_seed: SeedRun) -> SeedRun:
    """The run with the methods whose costs are measured: neither means of random routers, nor the gates."""
    methods = [m for m in run_of_seed.methods if m.name != TrainedGates().name and getattr(m, "num_samples", 1) > 0]
    return replace(run_of_seed, methods=tuple(methods))


def report(output: Path) -> Path:
    """Make the report of a finished study from its stored files, and return the path of its text.

    Args:
        output: Folder of the study.

    Raises:
        RecipeError: If there is no study, or a file is missing or damaged.
    """
    try:
        study, routes = read_study(output), read_routes(output)
        outcome = study.outcomes[0]
        seeds = sorted({result.seed for result in outcome.results})
        methods = list(dict.fromkeys(result.method for result in outcome.results))
        stability = read_stability(output, seeds, methods)
        costs = reported_costs(output)
    except (FileNotFoundError, ValueError) as error:
        raise RecipeError(str(error)) from error
    return write_report(output / "report", RouterReport.of(study, routes, stability, costs))[0]
