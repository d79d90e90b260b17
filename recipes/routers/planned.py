"""A study of routers before and while it is run: its settings, its runs, and what is measured of them."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bmoe_lightning.methods import Method
from bmoe_lightning.report import summarise, write_tensorboard
from bmoe_lightning.routers.discovery import find_routers
from bmoe_lightning.routers.noise_sweep import Stability
from bmoe_lightning.routers.stability import susceptible_layers
from recipes.paper.outcomes import Study
from recipes.paper.plan import PlannedRun
from recipes.paper.presets import Preset, chosen_preset
from recipes.paper.run import settings_of_run
from recipes.paper.sources import Questions, load_study_questions, pretrained_model, source_of
from recipes.paper.stored_study import StoredOutcome, stored_outcomes
from recipes.plan.architecture import build, describe, load_configuration
from recipes.plan.compute import active_macs
from recipes.qwen_obqa.experiment import completed_run
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.settings import ResolvedSettings
from recipes.qwen_obqa.sources import Source
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
from recipes.routers.settings import RouterSettings
from recipes.routers.stored_routes import Routes, count_costs, write_routes

_MODELS = "model"
_TENSORBOARD = "tensorboard"
SUSCEPTIBLE_GAMMA = 0.01
"""Size of the noise by which susceptible layers are chosen, as in https://arxiv.org/abs/2509.23830."""


@dataclass(frozen=True)
class PlannedStudy:
    """A study with a run for each seed, in a folder of its own, so that several processes can make them.

    Attributes:
        settings: Settings.
        preset: Preset.
        questions: Questions of all data sets.
        known: The methods that the study knows by name.
        names: Names of the methods with random routers.
    """

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

    def resumed(self) -> PlannedStudy:
        """The same study, whose run is resumed where it is found."""
        return replace(self, settings=replace(self.settings, overwrite=False))

    @property
    def others(self) -> tuple[str, ...]:
        """The data sets that are only tested on."""
        return tuple(name for name in self.questions.data if name != self.home)

    @property
    def seeds(self) -> range:
        """Seeds of the runs."""
        return range(self.settings.first_seed, self.settings.first_seed + (self.settings.seeds or self.preset.seeds))

    def run_settings(
        self, seed: int, methods: Sequence[Entry], others: Sequence[str] = ()
    ) -> tuple[PlannedRun, ResolvedSettings]:
        """The run of a seed and its settings.

        Args:
            seed: Seed.
            methods: Its methods.
            others: Data sets that it is tested on besides its own.
        """
        planned = PlannedRun(self.home, "experts", tuple(methods), tuple(others))
        assignments = with_variants(self.settings.set, methods, self.names)
        found = settings_of_run(planned, self.preset, self.settings, self.questions, {"set": assignments})
        folder = Path(found.output_dir)
        name = f"{folder.name}-{seed}"
        return planned, replace(found, output_dir=str(folder.with_name(name)), first_seed=seed, seeds=1)

    def pretrain(self, seed: int) -> None:
        """Pre-train the small model of a seed, unless it is there or the model is a given one.

        Args:
            seed: Seed.
        """
        settings = self.run_settings(seed, self.entries)[1]
        if (model := pretrained_model(settings, self.questions, self.output / _MODELS)) is not None:
            model.folder(seed, progress=False)

    @contextmanager
    def completed(
        self, methods: Sequence[Entry], others: Sequence[str] = (), seeds: Sequence[int] | None = None
    ) -> Iterator[list[SeedRun]]:
        """The completed runs of seeds.

        Args:
            methods: Their methods.
            others: Data sets that they are tested on besides their own.
            seeds: The seeds; None for all.
        """

        def prepare(settings: ResolvedSettings, methods: Sequence[Method]) -> Source:
            return source_of(planned, self.questions, self.output / _MODELS, settings, methods)

        runs: list[SeedRun] = []
        with ExitStack() as stack:
            for seed in self.seeds if seeds is None else seeds:
                planned, settings = self.run_settings(seed, methods, others)
                runs += stack.enter_context(completed_run(settings, prepare, announce=not runs))
            yield runs

    def outcomes(self, seeds: Sequence[SeedRun]) -> list[StoredOutcome]:
        """What completed runs have predicted.

        Args:
            seeds: Completed runs.
        """
        return stored_outcomes(self.output, self.home, "experts", seeds)

    def measure(self, runs: Sequence[SeedRun]) -> None:
        """Measure the stability of all methods on test questions, and of the fine-tuned model on calibration ones.

        What is stored is not measured again.

        Args:
            runs: Completed runs.
        """
        count = self.settings.stability_questions
        for run_of_seed in runs:
            methods = [method for method in run_of_seed.methods if self._has_routes(method)]
            measure_stability(self.output, run_of_seed, methods, count)
            reference = [method for method in methods if method.name == self.known.reference]
            measure_stability(self.output, run_of_seed, reference, count, "calibration")

    def reference(self) -> list[Stability]:
        """The measured stability of the fine-tuned model on calibration questions, by seed."""
        name = self.known.reference
        return list(read_stability(self.output, list(self.seeds), [name], "calibration")[name].values())

    def selected(self) -> list[Selection]:
        """The layers that are compared with all of them."""
        reference = self.reference()
        return selections(len(reference[0].floor), _susceptible(reference))

    def write(self, seeds: Sequence[SeedRun]) -> None:
        """Write what the study knows of its routers, and the comparison in TensorBoard.

        Args:
            seeds: Completed runs.
        """
        reference = self.reference()
        source = seeds[0].source
        config = load_configuration(source.model_of(seeds[0].seed))
        model = build(config, torch.float32)
        routes = Routes(
            names=self.names,
            layers=tuple(reference[0].floor),
            susceptible=tuple(_susceptible(reference)),
            selections={selection.name: (selection.label, selection.indices) for selection in self.selected()},
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


def plan_study(given: RouterSettings) -> PlannedStudy:
    """Plan a study, and refuse what would stop one of its runs later.

    Args:
        given: Settings.

    Raises:
        UsageError: If the settings exclude each other, or a method cannot be built.
        RecipeError: If questions cannot be loaded.
    """
    settings = with_preset(given)
    preset, known = chosen_preset(settings, PRESETS), read_known()
    names = tuple(random_router_names(settings.methods, known))
    study = PlannedStudy(settings, preset, load_study_questions(preset), known, names)
    build_methods(study.run_settings(study.seeds[0], study.entries)[1])
    return study


def _susceptible(reference: Sequence[Stability]) -> list[int]:
    """Indices of the layers of the fine-tuned model whose routes change most, in the mean over seeds."""
    under = [stability.embeddings[SUSCEPTIBLE_GAMMA] for stability in reference]
    layers = list(under[0])
    means = {name: statistics.fmean(indices[name] for indices in under) for name in layers}
    return [layers.index(name) for name in susceptible_layers(means)]
