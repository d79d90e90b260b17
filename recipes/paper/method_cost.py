"""Time and memory of the fit and the predictions of one method, beside the predictions of the reference."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bmoe_lightning import MultipleChoiceDataModule
from bmoe_lightning.base_finetuner import Finetuner
from bmoe_lightning.experts.logits_contract import ClassLogits
from bmoe_lightning.methods import BatchView, FitResult, Method, fit_methods
from bmoe_lightning.methods.base import MemberFit
from bmoe_lightning.methods.evaluation import prepared_member
from bmoe_lightning.methods.fit_index import stored_snapshots
from bmoe_lightning.methods.training_data import Batches, TrainingData
from bmoe_lightning.trainer.checks import optimised
from bmoe_lightning.trainer.data_passes import DataPass, TrainerTrainingData, validation_pass
from recipes.common.peak_memory import peak_memory
from recipes.common.timing import Action, in_turn, seconds, without_garbage_collection
from recipes.paper.report import Cost, Timing
from recipes.qwen_obqa.seed_run import SeedRun

MOST_SINGLE = 16
"""Largest number of test questions that are predicted alone."""
_ROUNDS = 3
_FEW_BATCHES = 2
_EPOCHS = "epochs"
"""Option of methods that train for several epochs, all of which take the same memory."""


@dataclass(frozen=True)
class OneMethod:
    """A method, and what it is fitted to and predicts with.

    Attributes:
        method: The method, as the run's settings have it.
        stored: The method with the files of its further runs.
        trainer: Trainer, set up as for training.
        module: The fine-tuned module.
        prior_mean: The weights from before fine-tuning, if a method uses them.
        run: The run, with the questions to measure on.
        most_batches: Largest number of training and of calibration batches of a fit; None for all.
    """

    method: Method
    stored: Method
    trainer: L.Trainer
    module: Finetuner
    prior_mean: Mapping[str, Tensor] | None
    run: SeedRun
    most_batches: int | None = None

    @property
    def device(self) -> torch.device:
        """Device of the module."""
        return self.module.device

    def cost(self, reference: Reference) -> Cost:
        """The costs; memory is measured first, which warms up for the times.

        Args:
            reference: The reference, whose predictions run in turn with this method's.
        """
        is_reference = self.method == reference.one.method
        fit_bytes, predict_bytes = (reference.fit_bytes, reference.predict_bytes) if is_reference else self.peak_bytes()
        fit, fitted = self._timed_fit(reference)
        own = partial(self.predict, fitted)
        actions: dict[str, Action] = (
            {"reference": own} if is_reference else {"reference": reference.predict, "own": own}
        )
        times = in_turn(actions, _ROUNDS, self.device, warm_up=False)
        return Cost(
            fit,
            Timing(times.get("own", times["reference"]), times["reference"]),
            self._latency(fitted, None if is_reference else reference),
            fit_bytes if self._has_fit([self.stored]) else None,
            predict_bytes,
            reference.predict_bytes,
            self.method.needs.runs,
        )

    def peak_bytes(self) -> tuple[int, int]:
        """Peak memory of the fit and of the predictions, with the model.

        Of a fit that trains for epochs, which keeps nothing of its batches, over some batches of one epoch.
        """
        if getattr(self.stored, _EPOCHS, 1) > 1:
            one_epoch: dict[str, Any] = {_EPOCHS: 1}
            return replace(self, stored=replace(self.stored, **one_epoch), most_batches=_FEW_BATCHES).peak_bytes()
        held = [*self.module.parameters(), *self.module.buffers()]
        resident = sum({storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in held)}.values())
        gc.collect()
        with peak_memory(self.device, held) as memory:
            fitted = self.fit([self.stored])
            fit_bytes = memory.peak + resident
            memory.restart()
            self.predict(fitted)
            return fit_bytes, memory.peak + resident

    def fit(self, methods: Sequence[Method]) -> FitResult:
        """Fit methods to the weights of the run.

        Args:
            methods: This method, or those that it has fitted to the weights of further runs.
        """
        if not self._has_fit(methods):
            return FitResult(seed=self.run.seed)
        trainer, most = self.trainer, self.most_batches
        training: TrainingData = TrainerTrainingData(trainer)
        held_out: Iterable[Any] | None = None
        if any(method.needs.calibration for method in methods):
            held_out = validation_pass(trainer, "Calibration")
        if most is not None:
            training = Batches(list(training.batches(most)))
            held_out = None if held_out is None else list(islice(held_out, most))
        return fit_methods(
            methods,
            self.module,
            self._class_logits,
            training,
            held_out,
            prior_mean=self.prior_mean,
            snapshots=self._snapshots,
            trained=optimised(trainer, self.module),
            seed=self.run.seed,
            is_checked=True,
            tell=lambda _: None,
        )

    def predict(self, fitted: FitResult) -> None:
        """Predict the test questions, the members of an ensemble one after the other.

        Args:
            fitted: Fit of the method.
        """

        def predict(fit: MemberFit) -> None:
            for batch in self._batches():
                self.predict_batch(fit, fitted.seed, batch)

        self._for_each_member(fitted, predict)

    def predict_batch(self, fit: MemberFit, seed: int, batch: Any) -> None:
        """Predict a batch with the weights that the model has.

        Args:
            fit: Fit to these weights.
            seed: Seed of the fit.
            batch: Batch.
        """
        view = BatchView(self.module, self._class_logits, batch, fit.posteriors, seed=seed)
        self.stored.log_probs(view, fit.state).cpu()

    def own_fit(self, fitted: FitResult) -> MemberFit:
        """The fit of the member that has the weights of the run.

        Args:
            fitted: Fit of the method.
        """
        state = fitted.state_of(self.stored)
        return MemberFit(state, fitted.posteriors_for(self.stored.curvatures_of(state), self.module))

    def _for_each_member(self, fitted: FitResult, action: Callable[[MemberFit], None]) -> None:
        own = self.own_fit(fitted)
        for member in self.stored.members(self.module, own.state, self._snapshots):
            with prepared_member(self.module, member, own) as fit:
                action(fit)

    def _timed_fit(self, reference: Reference) -> tuple[Timing | None, FitResult]:
        """Time of all fits, once, between two predictions of the reference; and the fit of the method."""
        needs, found = self.method.needs, list[FitResult]()
        has_further = bool(needs.runs) and self._has_fit(needs.run_methods)
        if not self._has_fit([self.stored]) and not has_further:
            return None, self.fit([self.stored])
        before = seconds(reference.predict, self.device)
        spent = seconds(lambda: found.append(self.fit([self.stored])), self.device)
        if has_further:  # the same work for the weights of each run
            spent += needs.runs * seconds(partial(self.fit, needs.run_methods), self.device)
        after = seconds(reference.predict, self.device)
        return Timing((spent, spent), (before, after)), found[0]

    def _latency(self, fitted: FitResult, reference: Reference | None) -> Timing:
        """Times of the prediction of one question by all members, whose weights are loaded before."""
        batches = list(self._batches(single=True))
        own: list[list[float]] = [[] for _ in batches]
        beside: list[list[float]] = [[] for _ in batches]

        def member(fit: MemberFit) -> None:
            def actions(batch: Any) -> dict[str, Action]:
                of_both: dict[str, Action] = {"own": partial(self.predict_batch, fit, fitted.seed, batch)}
                if reference is not None:
                    of_both["reference"] = partial(reference.single, batch)
                return of_both

            for action in actions(batches[0]).values():
                action()  # warms up
            with without_garbage_collection():
                for number, batch in enumerate(batches):
                    times = in_turn(actions(batch), 1, self.device, warm_up=False)
                    own[number] += times["own"]
                    beside[number] += times.get("reference", times["own"])

        self._for_each_member(fitted, member)
        return Timing(tuple(map(sum, own)), tuple(map(statistics.fmean, beside)))

    @staticmethod
    def _has_fit(methods: Sequence[Method]) -> bool:
        return any(m.is_fitted_method or any(curvature.collects for curvature in m.curvatures) for m in methods)

    @property
    def _snapshots(self) -> list[Path]:
        return stored_snapshots(self.run.fit_folder) if self.method.needs.max_snapshots else []

    def _batches(self, *, single: bool = False) -> DataPass:
        return predicted_batches(self.trainer, single=single)

    @property
    def _class_logits(self) -> ClassLogits:
        return class_logits(self.trainer)


def predicted_batches(trainer: L.Trainer, *, single: bool = False) -> DataPass:
    """A pass over the test questions of a trainer that is set up.

    Args:
        trainer: The trainer.
        single: Whether each batch is one question, and the first ones are enough.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]  # set by trainer.fit
    assert isinstance(data, MultipleChoiceDataModule)
    loader = data.test_dataloader()
    if single:
        questions = torch.utils.data.Subset(loader.dataset, range(min(MOST_SINGLE, len(data.questions("test")))))
        loader = DataLoader(questions, batch_size=1, collate_fn=loader.collate_fn)
    return DataPass(trainer, loader, len(loader), "Prediction", repeats=True)


def class_logits(trainer: L.Trainer) -> ClassLogits:
    """The logits of the module of a trainer that is set up, in the trainer's precision.

    Args:
        trainer: The trainer.
    """

    def logits(model: Any, batch: Any) -> tuple[Tensor, Tensor | None]:
        with trainer.precision_plugin.forward_context():
            found: tuple[Tensor, Tensor | None] = model.class_logits(batch)
            return found

    return logits


@dataclass(frozen=True)
class Reference:
    """The method that the others are compared with, which has one member.

    Attributes:
        one: The method.
        fitted: Its fit.
        fit_bytes: Peak memory of its fit, with the model.
        predict_bytes: Peak memory of its predictions, with the model.
    """

    one: OneMethod
    fitted: FitResult
    fit_bytes: int
    predict_bytes: int

    @classmethod
    def of(cls, one: OneMethod) -> Reference:
        """Measure the memory of the reference, and fit it.

        Args:
            one: The reference.
        """
        memory = one.peak_bytes()
        return cls(one, one.fit([one.stored]), *memory)

    def predict(self) -> None:
        """Predict the test questions."""
        self.one.predict(self.fitted)

    def single(self, batch: Any) -> None:
        """Predict a batch with the weights that the model has.

        Args:
            batch: Batch.
        """
        self.one.predict_batch(self.one.own_fit(self.fitted), self.fitted.seed, batch)
