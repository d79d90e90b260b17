"""The Lightning DataModule for multiple-choice questions, with batches that end right before the answer."""

import logging
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from bmoe_lightning.data.batches import Collate, EncodedQuestion, EncodedQuestions, PaddingSide, SeededShuffle
from bmoe_lightning.data.cloze import ClozeCollate, Normalisation, check_cloze, fit_cloze, indistinct
from bmoe_lightning.data.duplicates import make_disjoint
from bmoe_lightning.data.files import DataUnavailableError
from bmoe_lightning.data.padding import measured_padding_side, shares_prompts
from bmoe_lightning.data.prompts import answer_token_ids, get_prompt_format
from bmoe_lightning.data.protocols.base import Protocol
from bmoe_lightning.data.protocols.holdout import Holdout
from bmoe_lightning.data.protocols.registry import get_protocol
from bmoe_lightning.data.questions import Question, Splits, draw
from bmoe_lightning.data.splits import download_splits, load_splits
from bmoe_lightning.data.tasks.base import Task
from bmoe_lightning.data.tasks.registry import get_task
from bmoe_lightning.data.truncation import TRUNCATED, TruncationWarning, fit_prompts
from bmoe_lightning.models.loading import load_tokenizer

Part = Literal["train", "calibration", "test"]

_logger = logging.getLogger(__name__)

# Enough prompts to detect answer tokens that depend on the prompt.
_PROMPTS_FOR_ANSWER_TOKENS = 8
_CALIBRATION_FRACTION = 0.2


class MultipleChoiceDataModule(LightningDataModule):
    """Questions from a folder, from the hub or from memory, as batches that end right before the answer.

    The data's validation split is the calibration part, and without one a seeded share of train is set aside, unless a
    protocol says otherwise. Prior and temperature are tuned on that part and never on test. A question that is also
    asked in a later part (train < calibration < test) is left out of the earlier one, with a warning. Prompts are
    encoded once, in `setup`.

    After `setup`, `num_choices` is K_max over all parts, `answer_token_ids` `[K_max]` int64 are the answer tokens (None
    with the prompt `cloze`, whose batches have the tokens of their choices), and `questions(part)` are the questions
    that `index` refers to.

    Args:
        data: Folder or hub id as in `load_questions`, or the questions as `Splits`, with a calibration part such as
            `split_train` makes.
        tokenizer: Tokenizer, or the folder or hub id of one. Its settings are never changed.
        task: Task that turns rows into questions: registered name, instance or `package.module:Class`; None recognises
            the task by hub id or by columns.
        revision: Revision of a hub data set.
        protocol: Which questions train, calibrate and are reported: registered name, instance or
            `package.module:Class`. None is `holdout` with `calibration_fraction` and `seed`; the seed of any other is
            its own.
        prompt: Name of a prompt format, in which letters answer (`instruction`, `letters`) or words (`true_false`), or
            the text of each choice is scored after the question (`cloze`, with batches as
            `bmoe_lightning.data.cloze.ClozeBatch`).
        batch_size: Batch size of `train_dataloader`.
        eval_batch_size: Batch size of all other loaders; None for `batch_size`.
        max_length: Maximum number of tokens of a prompt, with `cloze` and its longest choice. Longer ones lose words of
            the passage, or, without a passage, from the front of the question.
        calibration_fraction: Share of train that is set aside if the data have no validation split.
        limit: Maximum number of questions of each part, a seeded sample for a quick trial; None for all.
        seed: Seed of the calibration split, of `limit` and of the training order.
        num_workers: Number of worker processes of every loader.
        padding_side: Side on which shorter prompts of a batch are padded. `auto` is the left, unless padding there
            changes the logits of the trainer's module, which is measured when the first loader is made: a few forward
            passes of the longest prompt. Without a trainer, or a module without `class_logits`, it is the left.
        normalise: With the prompt `cloze`, what the log-probability of a choice is divided by: `sum` for nothing,
            `characters` or `bytes` for the length of its text.
        shared_prompts: With the prompt `cloze`, whether all choices of a question follow its prompt in one row, which
            takes fewer tokens than a row for each. `auto` does so where it leaves the logits of the trainer's module as
            they are, which is measured when the first loader is made; without a trainer, each choice has a row.

    Raises:
        TypeError: If `data`, `tokenizer` or `task` has the wrong type.
        ValueError: If a number is out of range, prompt or task is unknown, `task` or `revision` is given with `Splits`,
            `protocol` is given with `Splits` or `calibration_fraction`, or a part is empty.
    """

    def __init__(
        self,
        data: str | Splits,
        tokenizer: PreTrainedTokenizerBase | str,
        task: str | Task | None = None,
        revision: str | None = None,
        protocol: str | Protocol | None = None,
        prompt: str = "instruction",
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 256,
        calibration_fraction: float = _CALIBRATION_FRACTION,
        limit: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        padding_side: Literal["auto", "left", "right"] = "auto",
        normalise: Normalisation = "sum",
        shared_prompts: Literal["auto"] | bool = "auto",
    ) -> None:
        super().__init__()
        for name, value in {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "max_length": max_length,
            "limit": limit,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be 0 or more")
        if not 0.0 < calibration_fraction < 1.0:
            raise ValueError(f"calibration_fraction is {calibration_fraction}; it must lie strictly between 0 and 1")
        if padding_side not in ("auto", "left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}; it must be auto, left or right")
        prompt_format = get_prompt_format(prompt)
        check_cloze(prompt_format, normalise, shared_prompts)
        _check_type("data", data, (str, Splits), "a folder, a hub id or Splits")
        _check_type("tokenizer", tokenizer, (str, PreTrainedTokenizerBase), "a tokenizer, or the folder or id of one")
        if isinstance(data, Splits):
            _check_not_empty(data)
            if any(option is not None for option in (task, revision, protocol)):
                raise ValueError(
                    "task, revision and protocol apply to a folder or hub id, but data are Splits; leave them out"
                )
        if protocol is not None and calibration_fraction != _CALIBRATION_FRACTION:
            raise ValueError("calibration_fraction applies without a protocol only; give the protocol's own options")
        self.data = data
        self.tokenizer = tokenizer
        self.task = None if task is None else get_task(task)
        self.revision = revision
        self.protocol = None if protocol is None else get_protocol(protocol)
        self.prompt_format = prompt_format
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_length = max_length
        self.calibration_fraction = calibration_fraction
        self.limit = limit
        self.seed = seed
        self.num_workers = num_workers
        self.padding_side: Literal["auto", "left", "right"] = padding_side
        self.normalise: Normalisation = normalise
        self.shared_prompts: Literal["auto"] | bool = shared_prompts
        self._prepared: _Prepared | None = None
        self._measured: _Measured | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All attributes except the measured module, which another process (a spawned one, say) does not share."""
        return vars(self) | {"_measured": None}

    def prepare_data(self) -> None:
        """Download a hub data set into the local cache, on one process only.

        Raises:
            DataUnavailableError: If the hub cannot be reached or does not have the data set.
        """
        if isinstance(self.data, str):
            download_splits(self.data, self._used_protocol(), task=self.task, revision=self.revision)

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Load, split and encode all questions on the first call; later calls do nothing.

        Args:
            stage: Stage, ignored: every stage needs the number of choices of all parts.

        Raises:
            DataUnavailableError: If data or tokenizer cannot be loaded.
            FileNotFoundError: If a split or configuration of the protocol is missing.
            ValueError: If the data are malformed, the tokenizer has no answer tokens, or prompts do not fit.
        """
        if self._prepared is None:
            self._prepared = self._prepare()

    def _prepare(self) -> "_Prepared":
        splits = self._read_splits()
        _check_not_empty(splits)
        parts: dict[Part, tuple[Question, ...]] = {
            "train": draw(splits.train, self.limit, seed=self.seed),
            "calibration": draw(splits.calibration, self.limit, seed=self.seed),
            "test": draw(splits.test, self.limit, seed=self.seed),
        }
        if isinstance(self.tokenizer, str):
            self.tokenizer = _load_tokenizer(self.tokenizer)
        tokenizer = self.tokenizer
        every_question = [question for questions in parts.values() for question in questions]
        # From all questions of the splits, so that `limit` does not change the number of classes.
        unlimited = (*splits.train, *splits.calibration, *splits.test)
        num_choices = max(len(question.choices) for question in unlimited)
        encoded = {part: self._encode(tokenizer, part, questions) for part, questions in parts.items()}
        pad_id = tokenizer.pad_token_id
        # Padding is masked out, so any id will do for a tokenizer without a padding token.
        pad_id = 0 if pad_id is None else pad_id
        answers = None
        if not self.prompt_format.cloze:
            # Spread over all parts, the first and the last question included.
            step = max(1, (len(every_question) - 1) // (_PROMPTS_FOR_ANSWER_TOKENS - 1))
            prompts = [self.prompt_format.render(question) for question in every_question[::step]]
            words = self.prompt_format.answers_of_all(unlimited)
            answers = answer_token_ids(tokenizer, prompts, num_choices, words=words)
        side: PaddingSide = "left" if self.padding_side == "auto" else self.padding_side
        collate = Collate(pad_id, num_choices, side)
        if self.prompt_format.cloze:
            collate = ClozeCollate(pad_id, num_choices, side, shared=self.shared_prompts is True)
        return _Prepared(parts, encoded, answers, collate)

    def _read_splits(self) -> Splits:
        if isinstance(self.data, Splits):
            return make_disjoint(self.data)
        return load_splits(self.data, self._used_protocol(), task=self.task, revision=self.revision)

    def _used_protocol(self) -> Protocol:
        return self.protocol or Holdout(fraction=self.calibration_fraction, seed=self.seed)

    def _encode(
        self, tokenizer: PreTrainedTokenizerBase, part: Part, questions: Sequence[Question]
    ) -> EncodedQuestions:
        if not self.prompt_format.cloze:
            rows, cut = fit_prompts(tokenizer, self.prompt_format, questions, self.max_length)
            items = [
                EncodedQuestion(tuple(ids), len(question.choices), question.answer, index)
                for index, (ids, question) in enumerate(zip(rows, questions, strict=True))
            ]
        else:
            items, cut = fit_cloze(tokenizer, self.prompt_format, questions, self.max_length, self.normalise)
        if cut:
            warnings.warn(
                f"{cut} of {len(questions)} {part} prompts were longer than max_length={self.max_length}; {TRUNCATED}",
                TruncationWarning,
                stacklevel=2,
            )
        alike = indistinct(items)
        if alike:
            warnings.warn(
                f"{alike} of {len(questions)} {part} questions have two choices with the same tokens, whose scores are "
                "equal: the texts are the same, or differ in words that the tokenizer does not know",
                UserWarning,
                stacklevel=2,
            )
        return EncodedQuestions(items, questions)

    @property
    def num_choices(self) -> int:
        """Largest number of choices of a question over all parts, K_max."""
        return self._ready().collate.num_choices

    @property
    def answer_token_ids(self) -> Tensor | None:
        """The answer token of each class, `[K_max]` int64; None where the texts of the choices are scored."""
        return self._ready().answer_token_ids

    @property
    def collate(self) -> Collate:
        """How batches are made: as measured for the trainer's module, if that was; see `padding_side`."""
        return self._ready().collate if self._measured is None else self._measured.collate

    def questions(self, split: Part) -> tuple[Question, ...]:
        """The questions of a part, in the order of `index`.

        Args:
            split: Part: `train`, `calibration` or `test`.

        Raises:
            ValueError: If there is no such part.
            RuntimeError: If `setup` has not run.
        """
        parts = self._ready().questions
        if split not in parts:
            raise ValueError(f"unknown split {split!r}; choose from {', '.join(parts)}")
        return parts[split]

    def train_dataloader(self) -> DataLoader[EncodedQuestion]:
        """The training questions, each epoch in an order drawn from `seed` and the epoch's number."""
        return self._loader("train", self.batch_size, SeededShuffle(len(self._ready().encoded["train"]), self.seed))

    def val_dataloader(self) -> DataLoader[EncodedQuestion]:
        """The calibration questions, in order."""
        return self.calibration_dataloader()

    def test_dataloader(self) -> DataLoader[EncodedQuestion]:
        """The test questions, in order."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[EncodedQuestion]:
        """The test questions, in order."""
        return self.test_dataloader()

    def calibration_dataloader(self) -> DataLoader[EncodedQuestion]:
        """The calibration questions, for tuning prior precisions and temperatures, in order."""
        return self._loader("calibration", self.eval_batch_size)

    def curvature_dataloader(self) -> DataLoader[EncodedQuestion]:
        """The training questions, in order and each once."""
        return self._loader("train", self.eval_batch_size)

    def _loader(self, part: Part, batch_size: int, sampler: Sampler[int] | None = None) -> DataLoader[EncodedQuestion]:
        prepared = self._ready()
        return DataLoader(
            prepared.encoded[part],
            batch_size=batch_size,
            sampler=sampler,
            # Even without shuffling a loader draws a base seed, by default from the global generator.
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=self._collate(),
            num_workers=self.num_workers,
            drop_last=False,
        )

    @property
    def measured_padding_side(self) -> PaddingSide | None:
        """The side that `padding_side="auto"` has chosen for the trainer's module; None until it is measured."""
        return None if self._measured is None or self.padding_side != "auto" else self._measured.collate.side

    @property
    def measured_shared_prompts(self) -> bool | None:
        """What `shared_prompts="auto"` has found for the trainer's module; None until it is measured."""
        collate = None if self._measured is None else self._measured.collate
        return collate.shared if isinstance(collate, ClozeCollate) and self.shared_prompts == "auto" else None

    def _collate(self) -> Collate:
        prepared = self._ready()
        is_cloze = isinstance(prepared.collate, ClozeCollate)
        sides, sharing = self.padding_side == "auto", is_cloze and self.shared_prompts == "auto"
        rows = max(self.batch_size, self.eval_batch_size)
        trainer: Any = self.trainer
        module = getattr(trainer, "lightning_module", None)
        class_logits: Any = getattr(module, "class_logits", None)
        # Batches of one prompt have no padding, unless its choices have rows of different lengths.
        measures = sharing or (sides and (rows > 1 or is_cloze))
        # These strategies run a module as a whole only, in their own forward.
        whole = isinstance(getattr(trainer, "strategy", None), (FSDPStrategy, DeepSpeedStrategy))
        if module is None or class_logits is None or whole or not measures:
            return prepared.collate if self._measured is None else self._measured.collate
        if self._measured is None or self._measured.module() is not module:
            longest = max((part.longest() for part in prepared.encoded.values()), key=lambda item: item.num_tokens)
            collate = prepared.collate
            if sides:
                side = measured_padding_side(module, class_logits, longest, collate, max(rows, 2))
                if side == "right":
                    _logger.info("prompts are padded on the right: on the left, padding changes the model's logits")
                collate = replace(collate, side=side)
            if sharing and isinstance(collate, ClozeCollate):
                shared = shares_prompts(module, class_logits, longest, collate, rows)
                _logger.info("the choices of a question have %s", "one row" if shared else "a row each")
                collate = replace(collate, shared=shared)
            self._measured = _Measured(weakref.ref(module), collate)
        return self._measured.collate

    def _ready(self) -> "_Prepared":
        if self._prepared is None:
            raise RuntimeError("the data are not prepared yet; call setup() first")
        return self._prepared


@dataclass(frozen=True)
class _Prepared:
    questions: dict[Part, tuple[Question, ...]]
    encoded: dict[Part, EncodedQuestions]
    answer_token_ids: Tensor | None
    collate: Collate


@dataclass(frozen=True)
class _Measured:
    """How prompts are padded for a module, and whether choices share their prompt's row."""

    module: weakref.ref[LightningModule]
    collate: Collate


def _check_type(name: str, value: object, types: tuple[type, ...], expected: str) -> None:
    if not isinstance(value, types):
        raise TypeError(f"{name} is a {type(value).__name__}; give {expected}")


def _check_not_empty(splits: Splits) -> None:
    for name in ("train", "calibration", "test"):
        if not getattr(splits, name):
            raise ValueError(
                f"the {name} split is empty, or all its questions are asked in a later split; "
                "train, calibration and test each need questions that are in no other"
            )


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataUnavailableError(
            f"the tokenizer {source!r} could not be loaded ({reason}); a local folder works instead"
        ) from None
