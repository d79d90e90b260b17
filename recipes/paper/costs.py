"""What each method of a study costs: the fit and the predictions of one at a time, on the stored fine-tuned weights.

In a study the methods share passes over the data, so that no stage of it says what one of them costs.
"""

from __future__ import annotations

import gc
import logging
import platform
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bmoe_lightning import MultipleChoiceDataModule
from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.data.questions import draw
from bmoe_lightning.experts.threads import model_lock
from bmoe_lightning.methods import BatchView, FitResult, Method, fit_methods
from bmoe_lightning.methods.base import MemberFit
from bmoe_lightning.methods.evaluation import Predictor
from bmoe_lightning.methods.fit_index import stored_snapshots
from bmoe_lightning.trainer.checks import optimised
from bmoe_lightning.trainer.data_passes import DataPass, TrainerTrainingData, validation_pass
from bmoe_lightning.trainer.signals import check_sigterm
from bmoe_lightning.utils.distributed import num_processes
from recipes.benchmark.measure import seconds
from recipes.common.peak_memory import peak_memory
from recipes.paper.outcomes import Mode
from recipes.paper.report import Cost
from recipes.paper.report.compared import read_compared
from recipes.paper.stored_costs import Conditions, StoredCost, read_costs, write_costs
from recipes.qwen_obqa.seed_run import SeedRun
from recipes.qwen_obqa.settings import ResolvedSettings
from recipes.qwen_obqa.sources import Source
from recipes.qwen_obqa.stored_predictions import origin_of_predictions

MOST_TRAINING, MOST_CALIBRATION, MOST_TEST, MOST_SINGLE = 1024, 512, 256, 16
"""Largest numbers of questions of each split that a method is measured on, and of test questions that are one batch."""
_REPEATS = 3
_SEVERAL = (
    "The study was made on several processes, each of which has a part of the questions and maybe of the weights: what "
    "one of them needs is not what the method needs on one device."
)


def measure_costs(output: Path, runs: Mapping[Mode, SeedRun]) -> None:
    """Measure what the methods of finished runs cost, and store it; what is stored is not measured again.

    Of the study only the file of costs is written.

    Args:
        output: Folder of the study, which this process has locked.
        runs: The run to measure of each mode.

    Warns:
        UserWarning: If the file of an earlier measurement is damaged; everything is then measured again.
    """
    if num_processes() > 1:
        write_costs(output, (), _SEVERAL)
        return
    wanted = {(mode, method.name): method for mode, run in runs.items() for method in _rows(run)}
    known = _known(output)
    missing = [key for key in wanted if key not in known]
    if not missing:
        return
    here = _here(next(iter(runs.values())).settings)
    if any((entry.conditions.host, entry.conditions.device) != here for entry in known.values()):
        known, missing = {}, list(wanted)  # a ratio of times on two machines says nothing
    lost = [_words(*key) for key in missing if not runs[key[0]].has_trained(wanted[key])]

    def store(entry: StoredCost | None = None) -> None:
        if entry is not None:
            known[entry.mode, entry.method] = entry
        pending = [text for key in wanted if key not in known and (text := _words(*key)) not in lost]
        # Those of other tables, which are not asked for now, too.
        entries = [known[key] for key in dict.fromkeys((*wanted, *known)) if key in known]
        write_costs(output, entries, _left_out(lost, pending))

    print("\nMeasuring what each method costs, one at a time", flush=True)
    for mode, run in runs.items():
        methods = [wanted[key] for key in missing if key[0] == mode and _words(*key) not in lost]
        if methods:
            _measure_run(_small(run), methods, partial(_stored, output, mode, run, here, store))
    if lost:
        store()


def _rows(run: SeedRun) -> list[Method]:
    """The methods of a run that are rows of the report's table."""
    compared = read_compared()
    return [method for method in run.methods if compared.without_part(method.name) is None]


def _words(mode: Mode, name: str) -> str:
    return f"{name} ({mode})"


def _left_out(lost: Sequence[str], pending: Sequence[str]) -> str:
    """Sentences on the methods that are not measured: those without weights, and those whose turn has not come."""
    sentences = []
    if lost:
        sentences.append(f"Without {', '.join(lost)}, whose fine-tuned weights the study no longer has.")
    if pending:
        sentences.append(
            f"Without {', '.join(pending)}, since the measurement was stopped; run the command that made the study "
            "again."
        )
    return " ".join(sentences)


def _known(output: Path) -> dict[tuple[Mode, str], StoredCost]:
    try:
        return {(entry.mode, entry.method): entry for entry in read_costs(output).entries}
    except ValueError as error:
        warnings.warn(f"{error} The costs are measured again", stacklevel=3)
        return {}


def _here(settings: ResolvedSettings) -> tuple[str, str]:
    """The name of this machine, and the device that the runs use, in words."""
    if settings.accelerator != "cpu" and torch.cuda.is_available():
        return platform.node(), torch.cuda.get_device_name()
    return platform.node(), f"the CPU ({torch.get_num_threads()} threads)"


def _small(run: SeedRun) -> SeedRun:
    """The run with no more questions than are measured, and without progress bars."""
    source = run.source
    inputs = max(MOST_CALIBRATION, *(method.needs.calibration_inputs for method in run.methods))
    small: Source = replace(
        source,
        train=draw(source.train, MOST_TRAINING),
        calibration=draw(source.calibration, inputs),
        test=draw(source.test, MOST_TEST),
    )
    return replace(run, source=small, settings=replace(run.settings, quiet=True))


def _stored(
    output: Path,
    mode: Mode,
    run: SeedRun,
    here: tuple[str, str],
    store: Callable[[StoredCost], None],
    method: Method,
    cost: Cost,
) -> None:
    path, small = run.predictions.path(method), _small(run).source
    sizes = (len(small.train), len(small.calibration), len(small.test), min(MOST_SINGLE, len(small.test)))
    conditions = Conditions(*here, run.seed, *sizes, run.settings.batch_size, run.settings.eval_batch_size)
    relative = path.relative_to(output).as_posix()
    store(StoredCost(mode, method.name, relative, origin_of_predictions(path), conditions, cost))


def _measure_run(run: SeedRun, methods: Sequence[Method], done: Callable[[Method, Cost], None]) -> None:
    """Measure methods of a run one after the other, with one model."""

    def measure(trainer: L.Trainer, module: Finetuner, prior_mean: Mapping[str, Tensor] | None) -> None:
        for method in methods:
            check_sigterm(trainer)
            print(f"  {run.output.name}: {method.name}", flush=True)
            measured = _OneMethod(run.with_runs(method), trainer, module, prior_mean, run)
            done(method, replace(measured.cost(), further_runs=method.needs.runs))

    with _silent():
        run.with_trained(measure)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the warnings of fits, which the study has given already."""
    log = logging.getLogger("bmoe_lightning")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@dataclass(frozen=True)
class _OneMethod:
    """A method, and what it is fitted to and predicts with."""

    method: Method
    trainer: L.Trainer
    module: Finetuner
    prior_mean: Mapping[str, Tensor] | None
    run: SeedRun

    def cost(self) -> Cost:
        """The costs; memory is measured first, which warms up for the times."""
        device, held = self.module.device, _tensors(self.module)
        resident = sum({storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in held)}.values())
        gc.collect()
        with peak_memory(device, held) as memory:
            fitted = self._fit()
            fit_bytes = memory.peak + resident
            memory.restart()
            self._predict(fitted)
            predict_bytes = memory.peak + resident
        del fitted
        found: list[FitResult] = []
        fit_seconds = seconds(lambda: found.append(self._fit()), device)
        times = [seconds(partial(self._predict, found[0]), device) for _ in range(_REPEATS)]
        has_fit = self._has_fit
        return Cost(
            fit_seconds if has_fit else None,
            statistics.median(times),
            fit_bytes if has_fit else None,
            predict_bytes,
            self._latency(found[0], device),
        )

    @property
    def _has_fit(self) -> bool:
        return self.method.is_fitted_method or any(curvature.collects for curvature in self.method.curvatures)

    @property
    def _snapshots(self) -> list[Path]:
        return stored_snapshots(self.run.fit_folder) if self.method.needs.max_snapshots else []

    def _fit(self) -> FitResult:
        if not self._has_fit:
            return FitResult(seed=self.run.seed)
        trainer = self.trainer
        return fit_methods(
            [self.method],
            self.module,
            self._class_logits,
            TrainerTrainingData(trainer),
            validation_pass(trainer, "Calibration") if self.method.needs.calibration else None,
            prior_mean=self.prior_mean,
            snapshots=self._snapshots,
            trained=optimised(trainer, self.module),
            seed=self.run.seed,
            is_checked=True,
            tell=lambda _: None,
        )

    def _predict(self, fitted: FitResult) -> None:
        """Predict the test questions, the members of an ensemble one after the other."""
        method, model = self.method, self.module
        state = fitted.state_of(method)
        own = MemberFit(state, fitted.posteriors_for(method.prediction_curvatures, model))
        for member in method.members(model, state, self._snapshots):
            with model_lock(model), member as other:
                fit = other or own
                for batch in self._batches():
                    view = BatchView(model, self._class_logits, batch, fit.posteriors, seed=fitted.seed)
                    method.log_probs(view, fit.state).cpu()

    def _latency(self, fitted: FitResult, device: torch.device) -> float:
        """Median time of the prediction of one question, after that of the first."""
        predictor = Predictor(self.method, fitted, self._snapshots)

        def predict(batch: object) -> None:
            predictor.predict(self.module, self._class_logits, batch)[0].cpu()

        batches = list(self._batches(single=True))
        predict(batches[0])
        return statistics.median(seconds(partial(predict, batch), device) for batch in batches)

    def _batches(self, *, single: bool = False) -> DataPass:
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # set by trainer.fit
        assert isinstance(data, MultipleChoiceDataModule)
        loader = data.test_dataloader()
        if single:
            questions = torch.utils.data.Subset(loader.dataset, range(min(MOST_SINGLE, len(data.questions("test")))))
            loader = DataLoader(questions, batch_size=1, collate_fn=loader.collate_fn)
        return DataPass(self.trainer, loader, len(loader), "Prediction", repeats=True)

    def _class_logits(self, model: nn.Module, batch: object) -> tuple[Tensor, Tensor | None]:
        with self.trainer.precision_plugin.forward_context():
            return model.class_logits(batch)  # type: ignore[operator]  # a Finetuner


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
