"""Where a run takes its model and its questions from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bmoe_lightning import MultipleChoiceDataModule
from bmoe_lightning.data import DataUnavailableError, Question, load_questions
from bmoe_lightning.data.questions import draw
from bmoe_lightning.data.world import World
from bmoe_lightning.laplace.predictive import MIN_UNLABELLED
from bmoe_lightning.loading import ModelUnavailableError
from recipes.settings import ResolvedSettings
from recipes.small_model import pretrain
from recipes.text_model import read_questions


class RecipeError(RuntimeError):
    """The recipe cannot do what was asked for; the message is one sentence for a person."""


@dataclass(frozen=True)
class Source:
    """Model and questions of a run.

    Attributes:
        settings: resolved.
        model: folder or hub id of the model.
        tokenizer: folder or hub id of its tokenizer.
        train: questions for fine-tuning and curvature.
        calibration: held-out questions for priors and temperatures; None: a part of `train`.
        test: questions that nothing is tuned on.
        banner: what a person should know first.
    """

    settings: ResolvedSettings
    model: str
    tokenizer: str
    train: Sequence[Question]
    calibration: Sequence[Question] | None
    test: Sequence[Question]
    banner: str

    def data(self, seed: int) -> MultipleChoiceDataModule:
        """The questions as batches, in the order of a seed; which questions are in which split never changes."""
        settings = self.settings
        data = MultipleChoiceDataModule.from_questions(
            self.train,
            self.calibration,
            self.test,
            self.tokenizer,
            prompt=settings.prompt,
            batch_size=settings.batch_size,
            eval_batch_size=settings.eval_batch_size,
            max_length=settings.max_length,
            seed=seed,
        )
        data.setup()
        return data

    def ids(self, stage: str) -> tuple[str, ...]:
        """Ids of the questions of the `test` or calibration (`val`) split, in order."""
        questions = self.test if stage == "test" else self.calibration
        assert questions is not None
        return tuple(question.id for question in questions)


def prepare_source(settings: ResolvedSettings) -> Source:
    """Get model and questions ready.

    Raises:
        RecipeError: with one sentence, if either cannot be had or is malformed.
    """
    try:
        if settings.kind == "builtin":
            return _builtin(settings)
        return _real(settings)
    except (DataUnavailableError, ModelUnavailableError, FileNotFoundError, ValueError, RuntimeError) as error:
        raise RecipeError(str(error)) from error


def _builtin(settings: ResolvedSettings) -> Source:
    world = World()
    folder = Path(settings.output_dir) / "model"
    questions = world.questions("fit")
    banner = (
        "This is the small built-in model (3 layers of 8 experts) on a generated open-book task: a demonstration, not\n"
        "the paper's experiment. The paper's set-up, on a GPU:\n"
        "  python -m recipes.qwen_obqa --model Qwen/Qwen1.5-MoE-A2.7B --data allenai/openbookqa"
    )
    if settings.dry_run:
        model = str(read_questions(questions, folder / "random", steps=0, prompt=settings.prompt))
    else:
        model = str(pretrain(world, cache_dir=folder, progress=not settings.quiet))
    return _limited(settings, model, model, questions, world.questions("calibration"), world.questions("test"), banner)


def _real(settings: ResolvedSettings) -> Source:
    assert settings.data is not None
    train, validation, test = (load_questions(settings.data, split) for split in ("train", "validation", "test"))
    assert train is not None
    assert test is not None
    if settings.model is not None:
        banner = f"Model {settings.model} on {settings.data}."
        return _split(settings, settings.model, settings.model, train, validation, test, banner)
    folder = Path(settings.output_dir) / "model" / ("random" if settings.dry_run else "small")
    steps = {"steps": 0} if settings.dry_run else {}
    model = str(read_questions(train, folder, prompt=settings.prompt, progress=not settings.quiet, **steps))
    banner = (
        f"The small built-in model on {settings.data}: it has read the training questions and nothing else, so its\n"
        "accuracy is near guessing. For a model that knows answers add --model Qwen/Qwen1.5-MoE-A2.7B (on a GPU)."
    )
    return _split(settings, model, model, train, validation, test, banner)


def _split(
    settings: ResolvedSettings,
    model: str,
    tokenizer: str,
    train: Sequence[Question],
    calibration: Sequence[Question] | None,
    test: Sequence[Question],
    banner: str,
) -> Source:
    """Let the DataModule make the splits once (a calibration part of train, no question twice), for all seeds."""
    source = Source(settings, model, tokenizer, train, calibration, test, banner)
    data = source.data(seed=0)
    return _limited(
        settings,
        model,
        tokenizer,
        data.questions("train"),
        data.questions("calibration"),
        data.questions("test"),
        banner,
    )


def _limited(
    settings: ResolvedSettings,
    model: str,
    tokenizer: str,
    train: Sequence[Question],
    calibration: Sequence[Question],
    test: Sequence[Question],
    banner: str,
) -> Source:
    limit = settings.limit
    if settings.dry_run:
        # The evidence temperature wants a hundred inputs.
        limit = min(limit or 128, 128)
    train, calibration, test = (draw(part, limit, seed=0) for part in (train, calibration, test))
    needy = {"evidence_temperature", "shrunk_temperature"} & set(settings.method_names)
    if needy and len(calibration) < MIN_UNLABELLED:
        raise ValueError(
            f"{', '.join(sorted(needy))} need at least {MIN_UNLABELLED} calibration questions, and there are "
            f"{len(calibration)}; use more data (--limit), or leave them out of --methods"
        )
    return Source(settings, model, tokenizer, train, calibration, test, banner)
