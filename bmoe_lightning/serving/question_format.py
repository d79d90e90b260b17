"""How questions become batches of a model, and its outputs logits of their choices, as a file describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bmoe_lightning.data.batches import Collate, EncodedQuestion, PaddingSide
from bmoe_lightning.data.cloze import ClozeCollate, Normalisation, fit_cloze
from bmoe_lightning.data.prompts import get_prompt_format
from bmoe_lightning.data.questions import Question
from bmoe_lightning.data.truncation import PromptTooLongError, fit_prompts
from bmoe_lightning.models.answer_logits import answer_logits, checked_answer_ids
from bmoe_lightning.models.choice_logits import choice_logits, has_choice_tokens

if TYPE_CHECKING:
    from bmoe_lightning.data import MultipleChoiceDataModule

_PADDING_SIDES = ("left", "right")


@dataclass(frozen=True)
class QuestionFormat:
    """Prompt format, answer tokens and padding that a model was fine-tuned and its methods were fitted with.

    Attributes:
        prompt: Name of the prompt format; see `MultipleChoiceDataModule`.
        num_choices: Largest number of choices of a question, K.
        answer_token_ids: Token of each choice, K of them; None where the texts of the choices are scored.
        max_length: Maximum number of tokens of a prompt; longer ones lose words.
        pad_id: Token id of padded positions.
        padding_side: Side of the padding.
        normalise: What the log-probability of a choice's text is divided by.
        shared_prompts: Whether the choices of a question share the row of its prompt, where their texts are scored.
        answer_words: Words that answer with each choice, in the order of the choices of every question; None where
            letters or texts do.

    Raises:
        TypeError: If a value has another type.
        ValueError: If a value is unknown or out of range, or the answer tokens do not fit the prompt format.
    """

    prompt: str
    num_choices: int
    answer_token_ids: tuple[int, ...] | None
    max_length: int = 256
    pad_id: int = 0
    padding_side: PaddingSide = "left"
    normalise: Normalisation = "sum"
    shared_prompts: bool = False
    answer_words: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise TypeError(f"prompt must be a name, got {self.prompt!r}")
        if type(self.shared_prompts) is not bool:
            raise TypeError(f"shared_prompts must be True or False, got {self.shared_prompts!r}")
        if self.normalise not in get_args(Normalisation):
            raise ValueError(f"normalise must be one of {', '.join(get_args(Normalisation))}, got {self.normalise!r}")
        for name, least in (("num_choices", 2), ("max_length", 1), ("pad_id", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.padding_side not in _PADDING_SIDES:
            raise ValueError(f"padding_side must be left or right, got {self.padding_side!r}")
        self._check_answers()

    def _check_answers(self) -> None:
        if self.answer_token_ids is not None:
            if any(type(token) is not int for token in self.answer_token_ids):
                raise TypeError(f"answer_token_ids must be integers, got {self.answer_token_ids!r}")
            object.__setattr__(self, "answer_token_ids", tuple(checked_answer_ids(self.answer_token_ids)))
        found = None if self.answer_token_ids is None else len(self.answer_token_ids)
        if found != (None if get_prompt_format(self.prompt).cloze else self.num_choices):
            raise ValueError(
                f"the prompt format {self.prompt!r} with {self.num_choices} choices has {found} answer tokens; give "
                "one for each choice, and none for cloze"
            )
        words = get_prompt_format(self.prompt).words
        if self.answer_words is not None:
            object.__setattr__(self, "answer_words", tuple(self.answer_words))
        if sorted(self.answer_words or ()) != sorted(words):
            raise ValueError(
                f"the prompt format {self.prompt!r} has the answer words {list(words)}, not {self.answer_words!r}; "
                "give them in the order of the choices that the model was fine-tuned with, none where there are none"
            )

    @classmethod
    def of_data(cls, data: MultipleChoiceDataModule) -> QuestionFormat:
        """The format of a DataModule that has been set up; what it measures has been measured if a trainer used it.

        Args:
            data: The DataModule.
        """
        answers, collate = data.answer_token_ids, data.collate
        return cls(
            prompt=data.prompt_format.name,
            num_choices=data.num_choices,
            answer_token_ids=None if answers is None else tuple(answers.tolist()),
            max_length=data.max_length,
            pad_id=collate.pad_id,
            padding_side=collate.side,
            normalise=data.normalise,
            shared_prompts=isinstance(collate, ClozeCollate) and collate.shared,
            # All questions have one order, or the DataModule would have refused them.
            answer_words=data.prompt_format.answers(data.questions("train")[0]) if data.prompt_format.words else None,
        )

    @classmethod
    def from_description(cls, content: Mapping[str, Any]) -> QuestionFormat:
        """The format of a description; see `description`.

        Args:
            content: The description.

        Raises:
            TypeError: If an entry is missing or unknown, or has another type.
            ValueError: As the class.
        """
        lists = {
            name: None if (found := content.get(name)) is None else tuple(found)
            for name in ("answer_token_ids", "answer_words")
        }
        return cls(**{**content, **lists})

    def description(self) -> dict[str, Any]:
        """The format in values that JSON has."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def encoded(
        self, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
    ) -> tuple[list[EncodedQuestion], int]:
        """Encode questions; those that are too long lose words, as in training (see `fit_prompts`).

        Args:
            tokenizer: Tokenizer of the model.
            questions: The questions; what they say of their answers is not used.

        Returns:
            `(encoded questions, number of those that lost words)`.

        Raises:
            ValueError: If a question has more choices than the format, or others than its answer words or in another
                order, or does not fit into `max_length` tokens even so.
        """
        for question in questions:
            if self.answer_words is not None and get_prompt_format(self.prompt).answers(question) != self.answer_words:
                raise ValueError(
                    f"the choices of question {question.id!r} must be {list(self.answer_words)} in this order, got "
                    f"{list(question.choices)}"
                )
            if len(question.choices) > self.num_choices:
                raise ValueError(
                    f"question {question.id!r} has {len(question.choices)} choices, and the model was fine-tuned for "
                    f"at most {self.num_choices}; drop choices, or fine-tune with such questions"
                )
        form = get_prompt_format(self.prompt)
        try:
            if form.cloze:
                return fit_cloze(tokenizer, form, questions, self.max_length, self.normalise)
            rows, cut = fit_prompts(tokenizer, form, questions, self.max_length)
        except PromptTooLongError as error:
            raise ValueError(
                f"{error.found}, and the model was fine-tuned with prompts of at most {self.max_length}; shorten or "
                "drop it"
            ) from None
        return [
            EncodedQuestion(tuple(ids), len(question.choices), question.answer, index)
            for index, (ids, question) in enumerate(zip(rows, questions, strict=True))
        ], cut

    def batch(self, items: Sequence[EncodedQuestion], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """One batch of encoded questions, without labels; see `bmoe_lightning.data.batches.Batch`.

        Args:
            items: Encoded questions, at least one.
            device: Device of its tensors.
        """
        collate = Collate(self.pad_id, self.num_choices, self.padding_side)
        if get_prompt_format(self.prompt).cloze:
            collate = ClozeCollate(self.pad_id, self.num_choices, self.padding_side, shared=self.shared_prompts)
        tensors: dict[str, Any] = {**collate(items)}
        return {name: value.to(device) for name, value in tensors.items() if name not in ("label", "index")}

    def class_logits(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits `[B, K]` of the choices of a batch, at least float32, `-inf` for choices that a question lacks.

        Args:
            model: Causal language model of transformers.
            batch: As of `batch`.
        """
        if has_choice_tokens(batch):
            return choice_logits(model, batch)
        answers = torch.tensor(self.answer_token_ids, device=batch["input_ids"].device)
        return answer_logits(model, batch, answers)


class ServedModule(nn.Module):
    """A model under the name that it has in our LightningModules, so that their files name its weights.

    Attributes:
        model: Causal language model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
