"""Where a run takes its model and its questions from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import AutoConfig

from bmoe_lightning import MultipleChoiceDataModule
from bmoe_lightning.data import DataUnavailableError, Question, load_questions
from bmoe_lightning.data.questions import Splits, draw, drop_overlap, split_train
from bmoe_lightning.laplace.predictive import MIN_UNLABELLED
from bmoe_lightning.models import register_models
from bmoe_lightning.models.loading import HUB_ID, ModelUnavailableError
from recipes.qwen_obqa.builtin_model import pretrain
from recipes.qwen_obqa.builtin_task import World
from recipes.qwen_obqa.reader_model import read_questions
from recipes.qwen_obqa.settings import ResolvedSettings


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
        calibration: held-out questions for priors and temperatures.
        test: questions that nothing is tuned on.
        banner: what a person should know first.
    """

    settings: ResolvedSettings
    model: str
    tokenizer: str
    train: Sequence[Question]
    calibration: Sequence[Question]
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
        return tuple(question.id for question in (self.test if stage == "test" else self.calibration))


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


def check_model(source: str) -> None:
    """Ask for a model's configuration, a small file, before anything large is downloaded.

    Raises:
        ModelUnavailableError: with one sentence naming the model, if there is no such folder, the hub cannot give it,
            or transformers does not know its kind.
    """
    folder = Path(source).is_dir()
    if not folder and not HUB_ID.fullmatch(source):
        raise ModelUnavailableError(f"--model: there is no folder {source!r}, and it is no hub id, which is owner/name")
    register_models()
    try:
        AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        remedy = "are all its files there and whole?" if folder else "the path of a local folder works without the hub."
        raise ModelUnavailableError(f"the model {source!r} could not be had ({reason}); {remedy}") from None


def _builtin(settings: ResolvedSettings) -> Source:
    world = World()
    splits = Splits(world.questions("fit"), world.questions("calibration"), world.questions("test"))
    drawn = _limited(settings, splits)
    banner = (
        "This is the small built-in model (3 layers of 8 experts) on a generated open-book task: a demonstration, not\n"
        "the paper's experiment. The paper's set-up, on a GPU:\n"
        "  python -m recipes.qwen_obqa --model Qwen/Qwen1.5-MoE-A2.7B --data allenai/openbookqa"
    )
    if settings.dry_run:
        model = _reader(settings, splits.train)
    else:
        model = str(pretrain(world, cache_dir=_model_folder(settings), progress=not settings.quiet))
    return Source(settings, model, model, drawn.train, drawn.calibration, drawn.test, banner)


def _real(settings: ResolvedSettings) -> Source:
    assert settings.data is not None
    if settings.model is not None:
        check_model(settings.model)
    splits = _disjoint(
        load_questions(settings.data, "train"),
        load_questions(settings.data, "validation"),
        load_questions(settings.data, "test"),
    )
    drawn = _limited(settings, splits)
    if settings.model is not None:
        model = settings.model
        banner = f"Model {model} on {settings.data}."
    else:
        model = _reader(settings, splits.train)
        banner = (
            f"The small built-in model on {settings.data}: it has read the training questions and nothing else, so its"
            "\naccuracy is near guessing. For a model that knows answers add --model Qwen/Qwen1.5-MoE-A2.7B (on a GPU)."
        )
    source = Source(settings, model, model, drawn.train, drawn.calibration, drawn.test, banner)
    source.data(seed=0)  # a tokenizer, or prompts, that do not fit are noticed now
    return source


def _disjoint(train: Sequence[Question], validation: Sequence[Question] | None, test: Sequence[Question]) -> Splits:
    """Make the splits once, for all seeds and for the small model's reading: no question is in two of them."""
    train = drop_overlap(train, test)
    if validation is None:
        return Splits(*split_train(train), tuple(test))
    validation = drop_overlap(validation, test, name="calibration")
    return Splits(drop_overlap(train, validation, held_out_name="calibration"), validation, tuple(test))


def _limited(settings: ResolvedSettings, splits: Splits) -> Splits:
    limit = settings.limit
    if settings.dry_run:
        # The evidence temperature wants a hundred inputs.
        limit = min(limit or 128, 128)
    train, calibration, test = (draw(part, limit, seed=0) for part in (splits.train, splits.calibration, splits.test))
    needy = {"evidence_temperature", "shrunk_temperature"} & set(settings.method_names)
    if needy and len(calibration) < MIN_UNLABELLED:
        raise ValueError(
            f"{', '.join(sorted(needy))} need at least {MIN_UNLABELLED} calibration questions, and there are "
            f"{len(calibration)}; use more data (--limit), or leave them out of --methods"
        )
    return Splits(train, calibration, test)


def _reader(settings: ResolvedSettings, train: Sequence[Question]) -> str:
    """The folder of a small model that has read these questions, or in a dry run only knows their words."""
    kind, steps = ("random", {"steps": 0}) if settings.dry_run else ("small", {})
    # A later run into the same folder may be about other questions.
    content = json.dumps([settings.prompt, [asdict(question) for question in train]])
    folder = _model_folder(settings) / f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    return str(read_questions(train, folder, prompt=settings.prompt, progress=not settings.quiet, **steps))


def _model_folder(settings: ResolvedSettings) -> Path:
    return Path(settings.output_dir) / "model"
