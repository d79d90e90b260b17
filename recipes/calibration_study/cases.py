"""The fine-tunings of the study, and what is stored of each.

A case is one fine-tuned model. Its held-out questions go through the model once; everything that a method can be fitted
on, for any subset of the calibration questions, is arithmetic on the logits and covariance terms that are stored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from bmoe_lightning import ExpertFinetuner, MultipleChoiceDataModule
from bmoe_lightning.curvature import Curvature
from bmoe_lightning.data import Question, load_questions
from bmoe_lightning.data.duplicates import make_disjoint
from bmoe_lightning.data.questions import Splits, draw
from bmoe_lightning.experts.discovery import find_expert_layers
from bmoe_lightning.experts.model_state import evaluation_mode
from bmoe_lightning.experts.weights import down_proj_weights
from bmoe_lightning.laplace.posterior import LaplacePosterior
from bmoe_lightning.laplace.prior import SCOPES, Scope
from bmoe_lightning.laplace.validation_cache import ValidationCache
from bmoe_lightning.methods import BatchView, Needs
from bmoe_lightning.methods.base import CurvatureMethod, State
from bmoe_lightning.methods.temperature_search import fit_temperature
from bmoe_lightning.methods.training_data import Batches
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.utils.safetensors_io import read_tensor_file, write_tensor_file
from recipes.calibration_study.settings import StudySettings
from recipes.qwen_obqa.builtin_model import pretrain
from recipes.qwen_obqa.builtin_task import World
from recipes.qwen_obqa.reader_model import read_questions

CALIBRATION_ITEMS = 256
"""Held-out questions of the built-in task in the calibration split; the others are the test split."""

_REAL_ITEMS = 256
_REAL_CALIBRATION_ITEMS = 320
_REAL_TEST_ITEMS = 300
_FORMAT = "calibration case"
_VERSION = 1
_REMEDY = "delete it, and run the same command again"
CURVATURE = Curvature(rank=32)
"""Curvature of every case."""


@dataclass(frozen=True)
class Kind:
    """A kind of fine-tuning of the built-in task.

    Args:
        name: Name in tables.
        items: Number of training questions.
        epochs: Number of epochs.
        learning_rate: Peak learning rate.
        random_labels: Share of the questions, of all splits, whose label is drawn at random.
        pretrained: Whether the model is pre-trained; otherwise its frozen weights are random and nothing can be learnt
            that holds for other questions.
        calibrated: Whether the model's logits are divided by the temperature that is best on all its held-out
            questions, so that nothing is left to correct.
    """

    name: str
    items: int = 259
    epochs: int = 44
    learning_rate: float = 6e-4
    random_labels: float = 0.0
    pretrained: bool = True
    calibrated: bool = False


CALIBRATED = "calibrated already"
KINDS = (
    Kind("normal"),
    Kind("memorises", items=64, epochs=80, learning_rate=1e-3),
    Kind("fails to learn", epochs=20, learning_rate=1e-3, pretrained=False),
    Kind("a third of the labels random", epochs=30, random_labels=1 / 3),
    Kind(CALIBRATED, calibrated=True),
)


@dataclass(frozen=True)
class HeldOut:
    """Held-out questions under a fine-tuned model.

    Attributes:
        cache: Logits `[N, K]`, labels `[N]` and covariance terms.
    """

    cache: ValidationCache

    @property
    def logits(self) -> Tensor:
        """Logits `[N, K]` of the model itself, float64."""
        return self.cache.logits

    @property
    def labels(self) -> Tensor:
        """Labels `[N]`."""
        assert self.cache.labels is not None  # every question of the study has one
        return self.cache.labels

    def select(self, indices: Tensor) -> HeldOut:
        """Some of the questions."""
        cache = self.cache
        chosen = {name: getattr(cache, name)[indices] for name in ("logits", "labels", "embedding", "prior", "binned")}
        return HeldOut(replace(cache, **chosen))


@dataclass(frozen=True)
class Case:
    """One fine-tuned model.

    Attributes:
        task: Name of the questions.
        kind: Kind of fine-tuning.
        seed: Seed of pre-training and fine-tuning.
        calibration: Calibration questions, in random order.
        test: Test questions.
        precisions: Prior precisions `[L]` that maximise the evidence, by scope.
    """

    task: str
    kind: str
    seed: int
    calibration: HeldOut
    test: HeldOut
    precisions: Mapping[Scope, Tensor]


@dataclass(frozen=True)
class _Terms(CurvatureMethod):
    """Stands for all methods of the study before the workbench: it needs everything that they need."""

    name: str = "terms"
    label: str = "Terms"

    @property
    def needs(self) -> Needs:
        return Needs(calibration_labels=True, prior_mean=True)

    def log_probs(self, batch: BatchView, state: State) -> Tensor:  # noqa: ARG002  (a method's signature)
        return batch.logits.log_softmax(-1)


def cases(settings: StudySettings) -> Iterator[Case]:
    """Every case of the study; those that are not in the output folder yet are fine-tuned now."""
    root = Path(settings.output_dir)
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        for kind in KINDS:
            yield _stored(root, "built-in", kind.name, seed, partial(_builtin, kind, seed, settings))
        for source in settings.data:
            yield _stored(root, Path(source).name, "normal", seed, partial(_real, source, seed, settings))


@dataclass(frozen=True)
class _Plan:
    """What a case is fine-tuned from."""

    model: str
    questions: Splits
    epochs: int
    learning_rate: float
    prompt: str
    calibrated: bool = False


def _builtin(kind: Kind, seed: int, settings: StudySettings) -> _Plan:
    world = World()
    held_out = (*world.questions("calibration"), *world.questions("test"))
    splits = Splits(world.questions("fit")[: kind.items], held_out[:CALIBRATION_ITEMS], held_out[CALIBRATION_ITEMS:])
    folder = Path(settings.output_dir) / "model"
    if kind.pretrained:
        model = pretrain(world, cache_dir=folder, seed=seed, progress=not settings.quiet)
    else:
        model = read_questions(
            world.questions("fit"), folder / f"random-{seed}", steps=0, prompt="letters", seed=seed, progress=False
        )
    if kind.random_labels:
        rng = random.Random(f"labels {seed}")
        parts = (splits.train, splits.calibration, splits.test)
        splits = Splits(*(_with_random_labels(part, kind.random_labels, rng) for part in parts))
    return _Plan(str(model), splits, kind.epochs, kind.learning_rate, "letters", kind.calibrated)


def _with_random_labels(questions: Sequence[Question], share: float, rng: random.Random) -> tuple[Question, ...]:
    return tuple(replace(q, answer=rng.randrange(len(q.choices))) if rng.random() < share else q for q in questions)


def _real(source: str, seed: int, settings: StudySettings) -> _Plan:
    test = load_questions(source, "test")
    assert test is not None  # load_questions raises without a test split
    train = make_disjoint(Splits(load_questions(source, "train"), (), test)).train
    drawn = draw(train, _REAL_ITEMS + _REAL_CALIBRATION_ITEMS, seed=seed)
    splits = Splits(drawn[:_REAL_ITEMS], drawn[_REAL_ITEMS:], draw(test, _REAL_TEST_ITEMS, seed=0))
    folder = Path(settings.output_dir) / "model" / f"{Path(source).name}-{seed}"
    model = read_questions(splits.train, folder, steps=150, prompt="letters", seed=seed, progress=not settings.quiet)
    return _Plan(str(model), splits, 12, 1e-3, "letters")


def _stored(root: Path, task: str, kind: str, seed: int, plan: Callable[[], _Plan]) -> Case:
    path = root / "cases" / f"{task}-{kind}-{seed}.safetensors".replace(" ", "_")
    if not path.is_file():
        _fine_tune(path, plan(), seed, f"{task}, {kind}, seed {seed}")
    tensors = read_tensor_file(path, format=_FORMAT, version=_VERSION, remedy=_REMEDY).tensors
    held_out = {
        part: HeldOut(ValidationCache(**{e.name: tensors[f"{part}/{e.name}"] for e in fields(ValidationCache)}))
        for part in ("calibration", "test")
    }
    precisions = {scope: tensors[f"evidence/{scope}"] for scope in SCOPES}
    return Case(task, kind, seed, held_out["calibration"], held_out["test"], precisions)


def _fine_tune(path: Path, plan: _Plan, seed: int, title: str) -> None:
    print(f"fine-tuning: {title}", flush=True)
    L.seed_everything(seed, workers=True, verbose=False)
    data = MultipleChoiceDataModule(
        plan.questions, plan.model, prompt=plan.prompt, batch_size=32, eval_batch_size=64, seed=seed
    )
    data.setup()
    module = ExpertFinetuner(
        plan.model,
        answer_token_ids=data.answer_token_ids,
        learning_rate=plan.learning_rate,
        expert_dropout=0.2,
    )
    module.configure_model()
    before = {
        name: weight.clone()
        for layer in find_expert_layers(module)
        for name, weight in down_proj_weights(module, layer).items()
    }
    trainer = L.Trainer(
        max_epochs=plan.epochs,
        accelerator="cpu",
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=str(path.parent),
    )
    trainer.fit(module, datamodule=data)
    loaders = {"calibration": data.val_dataloader(), "test": data.test_dataloader()}
    temperature = _best_temperature(module, loaders.values()) if plan.calibrated else 1.0
    tensors: dict[str, Tensor] = {}
    posteriors: dict[str, LaplacePosterior] = {}
    for part, loader in loaders.items():
        work = Workbench(
            module,
            partial(_divided_logits, temperature),
            [_Terms(curvature=CURVATURE)],
            Batches(data.train_dataloader()),
            loader,
            prior_mean=before,
            posteriors=posteriors,
            seed=seed,
        )
        cache = work.covariances(CURVATURE)
        posteriors = work.posteriors
        tensors |= {f"{part}/{entry.name}": getattr(cache, entry.name) for entry in fields(cache)}
    tensors |= {f"evidence/{scope}": work.evidence_precision(CURVATURE, scope, "pretrained") for scope in SCOPES}
    write_tensor_file(path, tensors, format=_FORMAT, version=_VERSION, description={"case": title})


def _divided_logits(temperature: float, module: ExpertFinetuner, batch: Any) -> tuple[Tensor, Tensor | None]:
    logits, labels = module.class_logits(batch)
    return logits / temperature, labels


def _best_temperature(module: ExpertFinetuner, loaders: Iterable[Iterable[Any]]) -> float:
    """The temperature that is best on the questions of all loaders."""
    with torch.no_grad(), evaluation_mode(module):
        found = [module.class_logits(batch) for loader in loaders for batch in loader]
    labels = [part for _, part in found if part is not None]
    return fit_temperature(torch.cat([logits for logits, _ in found]), torch.cat(labels))
