"""All stages of a study of routers, and its report."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bmoe_lightning.methods import Method
from bmoe_lightning.report import summarise, write_tensorboard
from bmoe_lightning.routers.discovery import find_routers
from bmoe_lightning.routers.noise_sweep import Stability
from bmoe_lightning.routers.stability import susceptible_layers
from bmoe_lightning.utils.distributed import num_processes
from recipes.paper.costs import measure_costs, outstanding_costs
from recipes.paper.outcomes import Mode, Study
from recipes.paper.plan import PlannedRun
from recipes.paper.presets import Preset, chosen_preset
from recipes.paper.run import settings_of_run
from recipes.paper.sources import Questions, load_study_questions, source_of
from recipes.paper.stored_costs import reported_costs
from recipes.paper.stored_study import StoredOutcome, begin_study, read_study, stored_outcomes, write_study
from recipes.plan.architecture import build, describe, load_configuration
from recipes.plan.compute import active_macs
from recipes.qwen_obqa.experiment import completed_run, quieten
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.run_folder import locked_output, plain_notes
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.settings import ResolvedSettings
from recipes.qwen_obqa.sources import RecipeError, Source
from recipes.routers.gates import TrainedGates
from recipes.routers.measures import measure_stability, read_stability
from recipes.routers.methods import (
    Entry,
    Known,
    Selection,
    base_of,
    entries,
    layer_entries,
    random_router_names,
    read_known,
    selections,
    with_variants,
)
from recipes.routers.presets import PRESETS, default_samples, with_preset
from recipes.routers.report import RouterReport, write_report
from recipes.routers.settings import RouterSettings
from recipes.routers.stored_routes import Routes, count_costs, read_routes, write_routes

_MODELS = "model"
_TENSORBOARD = "tensorboard"
SUSCEPTIBLE_GAMMA = 0.01
"""Size of the noise by which susceptible layers are chosen, as in https://arxiv.org/abs/2509.23830."""


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
        study = _planned(settings)
        with locked_output(output):
            begin_study(output, study.described(), overwrite=settings.overwrite)
            with study.completed(study.entries, study.others) as seeds:
                reference = study.measured(seeds)  # on calibration questions, which choose layers
                shifted = [found for found in study.outcomes(seeds) if found.tested_on != study.home]
                measured: dict[Mode, SeedRun] = {"experts": _with_costs(seeds[0])}
            selected = selections(len(reference[0].floor), _susceptible(reference))
            with study.resumed().completed([*study.entries, *study.of_layers(selected)]) as seeds:
                write_study(output, study.described(), [*study.outcomes(seeds), *shifted])
                study.write(seeds, reference, selected)
                outstanding = outstanding_costs(output, measured)
                if outstanding:
                    measure_costs(output, measured, outstanding)
            written = _write_report(output)
            print(written.read_text(encoding="utf-8"), flush=True)
            print(f"\nDone in {time.monotonic() - started:.0f} s. Everything is in {output}.", flush=True)


def report(output: Path) -> None:
    """Make the report of a finished study from its stored files, and print it.

    Args:
        output: Folder of the study.

    Raises:
        RecipeError: If there is no study, or a file is missing or damaged.
    """
    print(_write_report(output).read_text(encoding="utf-8"), flush=True)


@dataclass(frozen=True)
class _Planned:
    """A study before it is run."""

    settings: RouterSettings
    preset: Preset
    questions: Questions
    known: Known
    names: tuple[str, ...]

    @property
    def output(self) -> Path:
        """Folder of the study."""
        return Path(self.settings.output_dir)

    @property
    def home(self) -> str:
        """The data set of the training."""
        return next(iter(self.questions.data))

    @property
    def num_samples(self) -> int | None:
        """Number of samples of a random router; None for a dry run, where methods have cheaper ones of their own."""
        return None if self.settings.dry_run else self.settings.num_samples or default_samples(self.preset)

    @property
    def entries(self) -> list[Entry]:
        """The methods on all layers."""
        return entries(self.names, self.known, self.num_samples)

    def of_layers(self, selected: Sequence[Selection]) -> list[Entry]:
        """The methods on some layers alone."""
        return layer_entries(self.names, selected, self.num_samples)

    def described(self) -> Study:
        """The study without outcomes."""
        labels = {entry.name: entry.label for entry in self.preset.data}
        dry = "DRY RUN, the numbers mean nothing: " if self.settings.dry_run else ""
        preset = f"routers, {self.settings.preset}"
        return Study(preset, f"{dry}{self.preset.label}", self.home, labels, tables=(), figures=(), outcomes=())

    def resumed(self) -> _Planned:
        """The same study, whose run is resumed where it is found."""
        return replace(self, settings=replace(self.settings, overwrite=False))

    @property
    def others(self) -> tuple[str, ...]:
        """The data sets that are only tested on."""
        return tuple(name for name in self.questions.data if name != self.home)

    def run_settings(self, methods: Sequence[Entry], others: Sequence[str] = ()) -> tuple[PlannedRun, ResolvedSettings]:
        """The one run of the study and its settings.

        Args:
            methods: Its methods.
            others: Data sets that it is tested on besides its own.
        """
        planned = PlannedRun(self.home, "experts", tuple(methods), tuple(others))
        assignments = with_variants(self.settings.set, methods, self.names)
        return planned, settings_of_run(planned, self.preset, self.settings, self.questions, {"set": assignments})

    @contextmanager
    def completed(self, methods: Sequence[Entry], others: Sequence[str] = ()) -> Iterator[list[SeedRun]]:
        """The completed runs of all seeds.

        Args:
            methods: Their methods.
            others: Data sets that they are tested on besides their own.
        """
        planned, settings = self.run_settings(methods, others)

        def prepare(settings: ResolvedSettings, methods: Sequence[Method]) -> Source:
            return source_of(planned, self.questions, self.output / _MODELS, settings, methods)

        with completed_run(settings, prepare) as seeds:
            yield seeds

    def outcomes(self, seeds: Sequence[SeedRun]) -> list[StoredOutcome]:
        """What completed runs have predicted.

        Args:
            seeds: Completed runs.
        """
        return stored_outcomes(self.output, self.home, "experts", seeds)

    def measured(self, seeds: Sequence[SeedRun]) -> list[Stability]:
        """Measure the stability of all methods on test questions, and of the fine-tuned model on calibration ones.

        What is stored is not measured again.

        Args:
            seeds: Completed runs.

        Returns:
            That of the fine-tuned model on calibration questions, by seed.
        """
        methods = [method for method in seeds[0].methods if self._has_routes(method)]
        name, count = self.known.reference, self.settings.stability_questions
        for run_of_seed in seeds:
            measure_stability(self.output, run_of_seed, methods, count)
            reference = [method for method in methods if method.name == name]
            measure_stability(self.output, run_of_seed, reference, count, "calibration")
        found = read_stability(self.output, [run_of_seed.seed for run_of_seed in seeds], [name], "calibration")
        return list(found[name].values())

    def write(self, seeds: Sequence[SeedRun], reference: Sequence[Stability], selected: Sequence[Selection]) -> None:
        """Write what the study knows of its routers, and the comparison in TensorBoard.

        Args:
            seeds: Completed runs.
            reference: Stability of the fine-tuned model on calibration questions, by seed.
            selected: Layers that are compared with all.
        """
        source = seeds[0].source
        config = load_configuration(source.model_of(seeds[0].seed))
        model = build(config, torch.float32)
        routes = Routes(
            names=self.names,
            layers=tuple(reference[0].floor),
            susceptible=tuple(_susceptible(reference)),
            selections={selection.name: (selection.label, selection.indices) for selection in selected},
            active_macs=active_macs(describe(model)),
            counted=count_costs(seeds[0].methods, find_routers(model)),
            num_questions=min(self.settings.stability_questions, len(source.test)),
        )
        write_routes(self.output, routes)
        folder = self.output / _TENSORBOARD
        shutil.rmtree(folder, ignore_errors=True)  # events of two comparisons would form one curve
        results = [result for run_of_seed in seeds for result in run_of_seed.results()]
        write_tensorboard(folder, results, summarise(results))

    def _has_routes(self, method: Method) -> bool:
        """Whether the stability of a method's routes is measured: not with a posterior, nor of several models."""
        if method.name == self.known.reference:
            return True
        is_random = method.needs.routers and base_of(method.name, self.names) is not None
        return is_random and not (method.curvatures or method.is_ensemble)


def _planned(given: RouterSettings) -> _Planned:
    settings = with_preset(given)
    preset, known = chosen_preset(settings, PRESETS), read_known()
    names = tuple(random_router_names(settings.methods, known))
    study = _Planned(settings, preset, load_study_questions(preset), known, names)
    build_methods(study.run_settings(study.entries)[1])  # raises now what would stop the run later
    return study


def _with_costs(run_of_seed: SeedRun) -> SeedRun:
    """The run with the methods whose costs are measured: neither means of random routers, nor the gates."""
    methods = [m for m in run_of_seed.methods if m.name != TrainedGates().name and getattr(m, "num_samples", 1) > 0]
    return replace(run_of_seed, methods=tuple(methods))


def _susceptible(reference: Sequence[Stability]) -> list[int]:
    """Indices of the layers of the fine-tuned model whose routes change most, in the mean over seeds."""
    under = [stability.embeddings[SUSCEPTIBLE_GAMMA] for stability in reference]
    layers = list(under[0])
    means = {name: statistics.fmean(indices[name] for indices in under) for name in layers}
    return [layers.index(name) for name in susceptible_layers(means)]


def _write_report(output: Path) -> Path:
    """Write the report of a finished study, and return the path of its text."""
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
