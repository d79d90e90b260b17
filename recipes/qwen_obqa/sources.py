"""Model and questions of a run: built in, from a folder, or from the hub."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

from transformers import AutoConfig

from bmoe_lightning import MultipleChoiceDataModule
from bmoe_lightning.data import DataUnavailableError, Question, load_splits
from bmoe_lightning.data.batches import PaddingSide
from bmoe_lightning.data.questions import Splits, draw
from bmoe_lightning.methods import Available, Method, check_needs
from bmoe_lightning.models import register_models
from bmoe_lightning.models.loading import ModelUnavailableError, model_source
from recipes.common.errors import RecipeError
from recipes.qwen_obqa.builtin_model import SmallModel
from recipes.qwen_obqa.builtin_task import World
from recipes.qwen_obqa.methods import build_methods
from recipes.qwen_obqa.reader_model import read_questions
from recipes.qwen_obqa.settings import ResolvedSettings

_DRY_RUN_BATCHES = 2  # of training and calibration; of that more if a method needs more inputs even in a dry run
_DRY_RUN_TEST = 8
_DEFAULT_PROTOCOL = "holdout"


@dataclass(frozen=True)
class OtherSet:
    """A data set that a run is tested on and not trained on.

    Attributes:
        splits: Its splits, of which the test split is used.
        prompt: Prompt format; None for that of the run.
    """

    splits: Splits
    prompt: str | None = None

    @property
    def tested(self) -> Splits:
        """The test split, and of the others no more than a DataModule needs: the question with the shortest text."""
        return replace(self.splits, train=_shortest(self.splits.train), calibration=_shortest(self.splits.calibration))


def _shortest(questions: Sequence[Question]) -> tuple[Question, ...]:
    def length(question: Question) -> int:
        return sum(map(len, (question.question, *question.choices, question.passage or "")))

    return tuple(sorted(questions, key=length)[:1])


class PretrainedBySeed(Protocol):
    """A small model with a pre-training for each seed, such as `SmallModel`."""

    def folder(self, seed: int, *, progress: bool = True) -> Path:
        """The checkpoint of a seed, pre-trained unless it is there.

        Args:
            seed: Seed of the pre-training.
            progress: Whether to show a progress bar.
        """
        ...


@dataclass(frozen=True)
class Source:
    """Model and questions of a run.

    Attributes:
        settings: Resolved settings.
        model: Folder or hub id of the model.
        tokenizer: Folder or hub id of the tokenizer.
        train: Questions for fine-tuning and curvature.
        calibration: Held-out questions for prior precisions and temperatures.
        test: Questions on which nothing is tuned.
        banner: Text that is printed first.
        small_model: A small model, pre-trained once for each seed; None for a model that all seeds share.
        others: Further data sets by name, on whose test splits the methods predict under a shift of the distribution.
        calibration_in_train: Whether calibration questions are trained on too, as some protocols have it.
    """

    settings: ResolvedSettings
    model: str
    tokenizer: str
    train: Sequence[Question]
    calibration: Sequence[Question]
    test: Sequence[Question]
    banner: str
    small_model: PretrainedBySeed | None = None
    others: Mapping[str, OtherSet] = field(default_factory=dict)
    calibration_in_train: bool = False

    def model_of(self, seed: int) -> str:
        """Folder or hub id of the model that a seed starts from; pre-trains a small one if it is not cached."""
        if self.small_model is None:
            return self.model
        return str(self.small_model.folder(seed, progress=not self.settings.quiet))

    def model_hash(self, seed: int) -> str:
        """Hash of the weights that a seed starts from, which tells apart small models pre-trained on two machines.

        Empty for `--model`, which is identified by its name.
        """
        return "" if self.settings.kind == "full" else weights_hash(Path(self.model_of(seed)))

    def data(
        self, seed: int, padding_side: PaddingSide | None = None, shared_prompts: bool | None = None
    ) -> MultipleChoiceDataModule:
        """The DataModule of a seed, which sets the training order; the splits do not depend on it.

        Args:
            seed: Seed of the order.
            padding_side: Side on which the model's prompts are padded; None has it measured.
            shared_prompts: Whether choices share the row of their prompt; None has it measured.
        """
        return self._module(self._splits, seed, padding_side, shared_prompts)

    def data_of(
        self, other: str, padding_side: PaddingSide | None = None, shared_prompts: bool | None = None
    ) -> MultipleChoiceDataModule:
        """The DataModule of another data set's test questions, whose prompts, answers and choices are its own.

        Args:
            other: Name of the test set.
            padding_side: As in `data`.
            shared_prompts: As in `data`.
        """
        found = self.others[other]
        return self._module(found.tested, 0, padding_side, shared_prompts, found.prompt)

    @property
    def _splits(self) -> Splits:
        parts = (tuple(self.train), tuple(self.calibration), tuple(self.test))
        return Splits(*parts, calibration_in_train=self.calibration_in_train)

    def _module(
        self,
        splits: Splits,
        seed: int,
        padding_side: PaddingSide | None,
        shared_prompts: bool | None,
        prompt: str | None = None,
    ) -> MultipleChoiceDataModule:
        settings = self.settings
        prompt = prompt or settings.prompt
        # What is given for the run's prompt, or was measured with it, is no option of another one.
        of_run = prompt == settings.prompt
        data = MultipleChoiceDataModule(
            splits,
            self.tokenizer,
            prompt=prompt,
            batch_size=settings.batch_size,
            eval_batch_size=settings.eval_batch_size,
            max_length=settings.max_length,
            seed=seed,
            padding_side=padding_side or "auto",
            normalise=settings.normalise if of_run else "sum",
            shared_prompts=shared_prompts if of_run and shared_prompts is not None else "auto",
        )
        data.setup()
        return data


def prepare_source(settings: ResolvedSettings, methods: Sequence[Method]) -> Source:
    """Load or create the model and the questions.

    Args:
        settings: Resolved settings.
        methods: Methods of the run, whose needs the questions are checked for.

    Raises:
        RecipeError: If either cannot be loaded or is malformed.
    """
    try:
        return (_builtin if settings.kind == "builtin" else _real)(settings, methods)
    except (DataUnavailableError, ModelUnavailableError, FileNotFoundError, ValueError, RuntimeError) as error:
        raise RecipeError(str(error)) from error


def weights_hash(folder: Path) -> str:
    """The first twelve hexadecimal digits of the SHA-256 digest of a model folder's weight files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def check_model(source: str) -> None:
    """Load a model's configuration, a small file, before anything large is downloaded.

    Raises:
        ModelUnavailableError: If there is no such folder, the hub cannot be reached or does not have the model, or its
            model type is unknown to transformers.
    """
    register_models()
    with model_source(source, ValueError):
        AutoConfig.from_pretrained(source, trust_remote_code=False)


def _builtin(settings: ResolvedSettings, methods: Sequence[Method]) -> Source:
    world = World()
    splits = Splits(world.questions("fit"), world.questions("calibration"), world.questions("test"))
    drawn = limited(settings, splits, methods)
    banner = (
        "This is the small built-in model (3 layers of 8 experts) on a generated open-book task: a demonstration, not\n"
        "the paper's experiment. The paper's set-up, on a GPU:\n"
        "  python -m recipes.qwen_obqa --model Qwen/Qwen1.5-MoE-A2.7B --data allenai/openbookqa"
    )
    if settings.dry_run:
        model = reader(settings, splits.train, _model_folder(settings))
        return Source(settings, model, model, drawn.train, drawn.calibration, drawn.test, banner)
    small = SmallModel(world, _model_folder(settings))
    first = Source(settings, "", "", drawn.train, drawn.calibration, drawn.test, banner, small)
    model = first.model_of(settings.first_seed)
    return replace(first, model=model, tokenizer=model)


def _real(settings: ResolvedSettings, methods: Sequence[Method]) -> Source:
    assert settings.data is not None
    if settings.model is not None:
        check_model(settings.model)
    protocol = settings.protocol or _DEFAULT_PROTOCOL
    logs = ("files",) if settings.protocol is None else ("files", "splits")
    with _logged(*(f"bmoe_lightning.data.{name}" for name in logs)) as lines:
        splits = load_splits(settings.data, protocol, task=settings.task, revision=settings.revision)
    drawn = limited(settings, splits, methods)
    if settings.model is not None:
        model = settings.model
        banner = f"Model {model} on {settings.data}."
    else:
        model = reader(settings, splits.train, _model_folder(settings))
        banner = (
            f"The small built-in model on {settings.data}: pre-trained on the training questions alone, so its accuracy"
            "\nis near chance. For a real language model add --model Qwen/Qwen1.5-MoE-A2.7B (on a GPU)."
        )
    banner = "\n".join([banner, *lines])
    source = Source(settings, model, model, drawn.train, drawn.calibration, drawn.test, banner)
    source = replace(source, calibration_in_train=drawn.calibration_in_train)
    source.data(seed=0)  # raises now if the tokenizer or the prompts do not fit
    return source


class _Lines(logging.Handler):
    """Collects the messages of loggers."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.lines.append(f"{message[:1].upper()}{message[1:]}.")


@contextmanager
def _logged(*names: str) -> Iterator[list[str]]:
    """Collect what some loggers log within the context."""
    logs, handler = [logging.getLogger(name) for name in names], _Lines()
    levels = [log.level for log in logs]
    for log in logs:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.removeHandler(handler)
            log.setLevel(level)


def limited(settings: ResolvedSettings, splits: Splits, methods: Sequence[Method]) -> Splits:
    """The splits of a run, with no more questions than its settings allow.

    Args:
        settings: Resolved settings.
        splits: All questions.
        methods: Methods of the run.

    Raises:
        ValueError: If too few questions are left for a method.
    """
    if settings.dry_run:  # what the full run would refuse, the dry run refuses
        full = replace(settings, dry_run=False)
        limited(full, splits, build_methods(full))
    limits = _limits(settings, methods)
    parts = (splits.train, splits.calibration, splits.test)
    train, calibration, test = (draw(part, limit, seed=0) for part, limit in zip(parts, limits, strict=True))
    try:
        check_needs(methods, Available(calibration_inputs=len(calibration), runs=True))
    except ValueError as error:
        raise ValueError(
            f"{error} (--limit and --limit-validation bound the questions, --methods names the methods)"
        ) from None
    return replace(splits, train=train, calibration=calibration, test=test)


def limited_test(
    settings: ResolvedSettings, test: Sequence[Question], methods: Sequence[Method]
) -> tuple[Question, ...]:
    """Test questions of a data set on which nothing is trained or tuned, no more than the settings allow.

    Args:
        settings: Resolved settings.
        test: All test questions.
        methods: Methods of the run.
    """
    return draw(test, _limits(settings, methods)[2], seed=0)


def _limits(settings: ResolvedSettings, methods: Sequence[Method]) -> tuple[int | None, ...]:
    """Largest number of training, calibration and test questions."""
    given = (settings.limit_train, settings.limit_validation, settings.limit_test)
    common: list[int | None] = [settings.limit] * 3
    if settings.dry_run:
        inputs = max(method.needs.calibration_inputs for method in methods)
        calibration = max(inputs, _DRY_RUN_BATCHES * settings.eval_batch_size)
        test = min(_DRY_RUN_TEST, settings.eval_batch_size)
        caps = (_DRY_RUN_BATCHES * settings.batch_size, calibration, test)
        common = [min(settings.limit or cap, cap) for cap in caps]
    return tuple(own or shared for own, shared in zip(given, common, strict=True))


def reader(settings: ResolvedSettings, train: Sequence[Question], parent: Path, *, seed: int = 0) -> str:
    """The folder of a small model pre-trained on these questions, or in a dry run with random weights.

    Args:
        settings: Resolved settings.
        train: Questions whose text is learnt.
        parent: Folder in which that of the model is created.
        seed: Seed of the pre-training.
    """
    kind, steps = ("random", {"steps": 0}) if settings.dry_run else ("small", {})
    # The questions are part of the name: a later run in the same folder may have other ones.
    content = json.dumps([settings.prompt, [asdict(question) for question in train]])
    of_seed = f"-{seed}" if seed else ""
    folder = parent / f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}{of_seed}"
    progress = not settings.quiet
    return str(read_questions(train, folder, prompt=settings.prompt, seed=seed, progress=progress, **steps))


def _model_folder(settings: ResolvedSettings) -> Path:
    return Path(settings.output_dir) / "model"
