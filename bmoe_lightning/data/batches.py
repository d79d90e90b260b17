"""Batches of encoded questions: what they hold, their order and how they are padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from bmoe_lightning.data.questions import Question

PaddingSide = Literal["left", "right"]


class Targets(TypedDict):
    """What a batch holds besides tokens; see `Batch`."""

    choice_mask: Tensor
    label: Tensor
    index: Tensor


class Batch(Targets):
    """One batch: B questions, T tokens in the longest one, K_max choices in the widest question of all splits.

    `input_ids` `[B, T]` int64 and `attention_mask` `[B, T]` int64 are padded on one side: the end of a prompt is the
    row's last position whose mask is 1. `choice_mask` `[B, K_max]` bool is False for choices that a question lacks,
    whose probability must be zero. `label` `[B]` int64. `index` `[B]` int64 is the position in the split, by which
    questions that a distributed sampler repeats are identified.
    """

    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as model input.

    Args:
        token_ids: Token ids of the prompt, ending in the last token before the answer.
        num_choices: Number of choices.
        label: Position of the right choice.
        index: Position in its split.
        choices: Token ids of each choice after the prompt; empty where a choice is answered by a letter.
        lengths: What the log-probability of each choice is divided by; empty likewise.
    """

    token_ids: tuple[int, ...]
    num_choices: int
    label: int
    index: int
    choices: tuple[tuple[int, ...], ...] = ()
    lengths: tuple[float, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the prompt and of all choices."""
        return len(self.token_ids) + sum(map(len, self.choices))


class EncodedQuestions(Dataset[EncodedQuestion]):
    """The encoded questions of one split, in order.

    Args:
        items: The questions as model input.
        questions: The questions themselves.
    """

    def __init__(self, items: Sequence[EncodedQuestion], questions: Sequence[Question]) -> None:
        self._items = tuple(items)
        self.questions = tuple(questions)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, position: int) -> EncodedQuestion:
        return self._items[position]

    def longest(self) -> EncodedQuestion:
        """The question with the most tokens."""
        return max(self._items, key=lambda item: item.num_tokens)


class SeededShuffle(Sampler[int]):
    """A sampler whose order in each epoch depends on the seed and the epoch's number alone.

    Lightning calls `set_epoch`, also after resuming from a checkpoint, so a resumed run has the same orders as an
    uninterrupted one.

    Args:
        size: Number of items.
        seed: Seed of all orders.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration.

        Args:
            epoch: Number of the epoch, counted from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        self.epoch += 1  # for loops that do not call set_epoch
        return iter(torch.randperm(self.size, generator=generator).tolist())


@dataclass(frozen=True)
class Collate:
    """Pads encoded questions and stacks them, without the tokenizer.

    Args:
        pad_id: Token id of padded positions. They are masked out, so any id of the vocabulary will do.
        num_choices: Width of `choice_mask`, K_max.
        side: Side of the padding.
    """

    pad_id: int
    num_choices: int
    side: PaddingSide = "left"

    def __call__(self, items: Sequence[EncodedQuestion]) -> Batch:
        """Collate items into a batch.

        Args:
            items: Questions of one split.
        """
        width = max(len(item.token_ids) for item in items)
        input_ids = torch.full((len(items), width), self.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros((len(items), width), dtype=torch.int64)
        for row, item in enumerate(items):
            place = self.place(len(item.token_ids), width)
            input_ids[row, place] = torch.tensor(item.token_ids, dtype=torch.int64)
            attention_mask[row, place] = 1
        return Batch(input_ids=input_ids, attention_mask=attention_mask, **self.targets(items))

    def place(self, length: int, width: int) -> slice:
        """The positions of a row's tokens.

        Args:
            length: Number of its tokens.
            width: Number of all positions.
        """
        return slice(width - length, width) if self.side == "left" else slice(length)

    def targets(self, items: Sequence[EncodedQuestion]) -> Targets:
        """What a batch holds besides tokens.

        Args:
            items: Questions of one split.
        """
        counts = torch.tensor([item.num_choices for item in items])
        return Targets(
            choice_mask=torch.arange(self.num_choices)[None, :] < counts[:, None],
            label=torch.tensor([item.label for item in items], dtype=torch.int64),
            index=torch.tensor([item.index for item in items], dtype=torch.int64),
        )
