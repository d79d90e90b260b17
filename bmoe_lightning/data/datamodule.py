"""The Lightning DataModule that turns multiple-choice questions into batches with a known answer position."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from bmoe_lightning.data.hub import DataUnavailableError, is_hub_id, load_questions
from bmoe_lightning.data.prompts import answer_token_ids, fit_prompts, get_prompt_format
from bmoe_lightning.data.questions import Question, Splits, draw, drop_overlap, split_train
from bmoe_lightning.models.loading import load_tokenizer

Part = Literal["train", "calibration", "test"]

# Enough prompts to see whether the answer tokens depend on what the prompt says.
_PROMPTS_FOR_ANSWER_TOKENS = 8


class Batch(TypedDict):
    """One batch; B questions, T tokens in the longest of them, K_max choices in the widest question of the whole task.

    `input_ids` `[B, T]` int64 and `attention_mask` `[B, T]` int64 are padded on the left, so the last column is always
    the end of the prompt. `choice_mask` `[B, K_max]` bool is False where a question has no such choice: no probability
    belongs there. `label` `[B]` int64. `index` `[B]` int64 is the position in the split: a sampler that repeats
    questions to fill up its last batch shows by repeated indices.
    """

    input_ids: Tensor
    attention_mask: Tensor
    choice_mask: Tensor
    label: Tensor
    index: Tensor


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as the model sees it.

    Args:
        token_ids: the prompt, ending in the last token before the answer.
        num_choices: how many choices it has.
        label: position of the right one.
        index: position in its split.
    """

    token_ids: tuple[int, ...]
    num_choices: int
    label: int
    index: int


class EncodedQuestions(Dataset[EncodedQuestion]):
    """The encoded questions of one split, in order."""

    def __init__(self, items: Sequence[EncodedQuestion]) -> None:
        self._items = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, position: int) -> EncodedQuestion:
        return self._items[position]


class SeededShuffle(Sampler[int]):
    """An order for every epoch that depends on nothing but the seed and the epoch's number.

    Lightning tells a sampler the epoch, also after resuming from a checkpoint: a resumed run then sees the orders that
    an uninterrupted one sees.

    Args:
        size: number of items.
        seed: of all orders.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        self.epoch += 1  # for a loop that does not name its epochs
        return iter(torch.randperm(self.size, generator=generator).tolist())


@dataclass(frozen=True)
class Collate:
    """Pads encoded questions on the left and stacks them; the tokenizer has no part in it.

    Args:
        pad_id: token id of padded positions. They are masked out, so any id of the vocabulary serves.
        num_choices: K_max, the width of `choice_mask`.
    """

    pad_id: int
    num_choices: int

    def __call__(self, items: Sequence[EncodedQuestion]) -> Batch:
        """Return the batch of these items."""
        width = max(len(item.token_ids) for item in items)
        input_ids = torch.full((len(items), width), self.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros((len(items), width), dtype=torch.int64)
        for row, item in enumerate(items):
            start = width - len(item.token_ids)
            input_ids[row, start:] = torch.tensor(item.token_ids, dtype=torch.int64)
            attention_mask[row, start:] = 1
        counts = torch.tensor([item.num_choices for item in items])
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            choice_mask=torch.arange(self.num_choices)[None, :] < counts[:, None],
            label=torch.tensor([item.label for item in items], dtype=torch.int64),
            index=torch.tensor([item.index for item in items], dtype=torch.int64),
        )


class MultipleChoiceDataModule(LightningDataModule):
    """Questions from a folder, from the hub or at hand, as batches that end right before the answer.

    The data's validation split is the calibration part; without one, a seeded share of train is set aside. Prior and
    temperature are tuned on that part and never on test. A question that is also asked in a later part (train <
    calibration < test) is dropped from the earlier one, with a warning. Prompts are encoded once, in `setup`.

    After `setup`: `num_choices` is K_max over all parts, `answer_token_ids` `[K_max]` int64 are the tokens that answer,
    `questions(part)` are the questions behind `index`.

    Args:
        data: folder or hub id as in `load_questions`, or `Splits`.
        tokenizer: a tokenizer, or the folder or hub id of one. Its settings are never changed.
        prompt: name of a prompt format.
        batch_size: questions in a batch of `train_dataloader`.
        eval_batch_size: questions in a batch of every other loader; the same if left out.
        max_length: most tokens in a prompt. Longer ones lose words from the front of the question's text.
        calibration_fraction: share of train to set aside where there is no validation split.
        limit: use at most this many questions of each part, a seeded draw; for a quick trial.
        seed: seed of the calibration split, of `limit` and of the training order.
        num_workers: worker processes of every loader.

    Raises:
        TypeError: if `data` or `tokenizer` is of another type.
        ValueError: if a number is out of range, the prompt is unknown, or a part is empty.
    """

    def __init__(
        self,
        data: str | Splits,
        tokenizer: PreTrainedTokenizerBase | str,
        prompt: str = "instruction",
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 256,
        calibration_fraction: float = 0.2,
        limit: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "max_length": max_length,
            "limit": limit,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be 0 or more.")
        if not 0.0 < calibration_fraction < 1.0:
            raise ValueError(f"calibration_fraction is {calibration_fraction}; it must lie strictly between 0 and 1.")
        _check_type("data", data, (str, Splits), "a folder, a hub id or Splits")
        _check_type("tokenizer", tokenizer, (str, PreTrainedTokenizerBase), "a tokenizer, or the folder or id of one")
        if isinstance(data, Splits):
            _check_not_empty(data)
        self.data = data
        self.tokenizer = tokenizer
        self.prompt_format = get_prompt_format(prompt)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.max_length = max_length
        self.calibration_fraction = calibration_fraction
        self.limit = limit
        self.seed = seed
        self.num_workers = num_workers
        self._prepared: _Prepared | None = None

    @classmethod
    def from_questions(
        cls,
        train: Sequence[Question],
        calibration: Sequence[Question] | None,
        test: Sequence[Question],
        tokenizer: PreTrainedTokenizerBase | str,
        prompt: str = "instruction",
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 256,
        calibration_fraction: float = 0.2,
        limit: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> "MultipleChoiceDataModule":
        """Make the DataModule from questions at hand.

        Args:
            train: what is fitted on.
            calibration: what prior and temperature are tuned on; None sets a seeded share of train aside.
            test: what is reported.
            tokenizer: as in the constructor, and so are all the others.
            prompt: name of a prompt format.
            batch_size: questions in a training batch.
            eval_batch_size: questions in every other batch.
            max_length: most tokens in a prompt.
            calibration_fraction: share of train to set aside if `calibration` is None.
            limit: most questions of each part.
            seed: seed of every draw.
            num_workers: worker processes of every loader.

        Raises:
            ValueError: if a part is empty, or for any reason of the constructor.
        """
        if calibration is None:
            train, calibration = split_train(train, calibration_fraction, seed=seed)
        return cls(
            data=Splits(train=tuple(train), calibration=tuple(calibration), test=tuple(test)),
            tokenizer=tokenizer,
            prompt=prompt,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            max_length=max_length,
            calibration_fraction=calibration_fraction,
            limit=limit,
            seed=seed,
            num_workers=num_workers,
        )

    def prepare_data(self) -> None:
        """Download a hub data set into the local cache, on one process only.

        Raises:
            DataUnavailableError: if the hub cannot give it.
        """
        if isinstance(self.data, str) and is_hub_id(self.data):
            load_questions(self.data, "test")

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Read, split and encode everything, at the first call; later calls do nothing.

        Raises:
            DataUnavailableError: if data or tokenizer cannot be had from the hub.
            FileNotFoundError: if the train or test split is missing.
            ValueError: if the data, the tokenizer or the prompt lengths do not fit, with what to do.
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
        # From the whole splits, so that `limit` does not change the number of classes.
        whole = (*splits.train, *splits.calibration, *splits.test)
        num_choices = max(len(question.choices) for question in whole)
        # Spread over all parts, the first and the last question included.
        step = max(1, (len(every_question) - 1) // (_PROMPTS_FOR_ANSWER_TOKENS - 1))
        prompts = [self.prompt_format.render(question) for question in every_question[::step]]
        answers = answer_token_ids(tokenizer, prompts, num_choices)
        encoded = {part: self._encode(tokenizer, part, questions) for part, questions in parts.items()}
        pad_id = tokenizer.pad_token_id
        return _Prepared(
            questions=parts,
            encoded=encoded,
            answer_token_ids=answers,
            # Padding is masked out, so a tokenizer without a padding token needs none made up for it.
            collate=Collate(pad_id=0 if pad_id is None else pad_id, num_choices=num_choices),
        )

    def _read_splits(self) -> Splits:
        if isinstance(self.data, Splits):
            train, calibration, test = self.data.train, self.data.calibration, self.data.test
        else:
            train, test = load_questions(self.data, "train"), load_questions(self.data, "test")
            validation = load_questions(self.data, "validation")
            if validation is None:
                fit, calibration = split_train(drop_overlap(train, test), self.calibration_fraction, seed=self.seed)
                return Splits(train=fit, calibration=calibration, test=test)
            calibration = validation
        calibration = drop_overlap(calibration, test, name="calibration")
        train = drop_overlap(train, (*calibration, *test), held_out_name="calibration or test")
        return Splits(train=train, calibration=calibration, test=test)

    def _encode(
        self, tokenizer: PreTrainedTokenizerBase, part: Part, questions: Sequence[Question]
    ) -> EncodedQuestions:
        rows, cut = fit_prompts(tokenizer, self.prompt_format, questions, self.max_length)
        if cut:
            warnings.warn(
                f"{cut} of {len(questions)} {part} prompts were longer than max_length={self.max_length}; "
                "words were cut from the front of their question.",
                UserWarning,
                stacklevel=2,
            )
        return EncodedQuestions(
            [
                EncodedQuestion(tuple(ids), len(question.choices), question.answer, index)
                for index, (ids, question) in enumerate(zip(rows, questions, strict=True))
            ]
        )

    @property
    def num_choices(self) -> int:
        """K_max, the number of choices of the widest question of all parts."""
        return self._ready().collate.num_choices

    @property
    def answer_token_ids(self) -> Tensor:
        """`[K_max]` int64, the token that answers with each letter."""
        return self._ready().answer_token_ids

    def questions(self, split: Part) -> tuple[Question, ...]:
        """Return the questions of a part, in the order that `index` counts.

        Raises:
            ValueError: if there is no such part.
            RuntimeError: before `setup`.
        """
        parts = self._ready().questions
        if split not in parts:
            raise ValueError(f"split {split!r} is not known; choose from {', '.join(parts)}.")
        return parts[split]

    def train_dataloader(self) -> DataLoader[EncodedQuestion]:
        """Return the training questions, each epoch in an order drawn from `seed` and the epoch's number."""
        return self._loader("train", self.batch_size, SeededShuffle(len(self._ready().encoded["train"]), self.seed))

    def val_dataloader(self) -> DataLoader[EncodedQuestion]:
        """Return the calibration questions, in order."""
        return self.calibration_dataloader()

    def test_dataloader(self) -> DataLoader[EncodedQuestion]:
        """Return the test questions, in order."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[EncodedQuestion]:
        """Return the test questions, in order."""
        return self.test_dataloader()

    def calibration_dataloader(self) -> DataLoader[EncodedQuestion]:
        """Return the questions that prior and temperature may be tuned on, in order."""
        return self._loader("calibration", self.eval_batch_size)

    def curvature_dataloader(self) -> DataLoader[EncodedQuestion]:
        """Return the questions that the weights were fitted on, in order and each once."""
        return self._loader("train", self.eval_batch_size)

    def _loader(self, part: Part, batch_size: int, sampler: Sampler[int] | None = None) -> DataLoader[EncodedQuestion]:
        prepared = self._ready()
        return DataLoader(
            prepared.encoded[part],
            batch_size=batch_size,
            sampler=sampler,
            # Even without shuffling a loader draws a number, and would take it from the global generator.
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=prepared.collate,
            num_workers=self.num_workers,
            drop_last=False,
        )

    def _ready(self) -> "_Prepared":
        if self._prepared is None:
            raise RuntimeError("the data are not prepared yet; call setup() first.")
        return self._prepared


@dataclass(frozen=True)
class _Prepared:
    questions: dict[Part, tuple[Question, ...]]
    encoded: dict[Part, EncodedQuestions]
    answer_token_ids: Tensor
    collate: Collate


def _check_type(name: str, value: object, types: tuple[type, ...], wanted: str) -> None:
    if not isinstance(value, types):
        raise TypeError(f"{name} is a {type(value).__name__}; give {wanted}.")


def _check_not_empty(splits: Splits) -> None:
    for name in ("train", "calibration", "test"):
        if not getattr(splits, name):
            raise ValueError(
                f"the {name} split is empty, or all its questions are asked in a later split; "
                "train, calibration and test each need questions of their own."
            )


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataUnavailableError(
            f"the tokenizer {source!r} could not be had ({reason}); a local folder works instead."
        ) from None
