"""What a served model says of questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bmoe_lightning.data.questions import LETTERS, Question
from bmoe_lightning.laplace.predictive import entropy

if TYPE_CHECKING:
    from bmoe_lightning.metrics import PredictionSets

# Columns of rows: the scores that not every method has, in their order, and the classes of a prediction set.
SCORE_COLUMNS = ("mutual_information", "logit_variance")
SET_COLUMN = "set"


@dataclass(frozen=True)
class ServedPredictions:
    """Predictions of questions, on the CPU, in their order.

    Attributes:
        log_probs: Log-probabilities `[N, K]` float64, `-inf` for choices that a question lacks.
        entropy: Entropy of the probabilities `[N]`, in nats.
        mutual_information: Mutual information of label and weights `[N]`, in nats; None for methods without one.
        logit_variance: Mean variance of the centred class logits `[N]`; None for methods without one.
    """

    log_probs: Tensor
    entropy: Tensor
    mutual_information: Tensor | None = None
    logit_variance: Tensor | None = None

    @classmethod
    def of(cls, log_probs: Tensor, scores: dict[str, Tensor]) -> ServedPredictions:
        """Predictions of one batch.

        Args:
            log_probs: Log-probabilities `[B, K]`.
            scores: Scores of the method, `[B]` each; see `Method.uncertainty`.
        """
        known = {name: scores[name].cpu() for name in SCORE_COLUMNS if name in scores}
        log_probs = log_probs.cpu()
        return cls(log_probs, entropy(log_probs), **known)

    @classmethod
    def joined(cls, parts: Sequence[ServedPredictions]) -> ServedPredictions:
        """Predictions of several batches with one method.

        Args:
            parts: The parts, at least one.
        """

        def scores(name: str) -> Tensor | None:
            found = [value for part in parts if (value := getattr(part, name)) is not None]
            return torch.cat(found) if found else None

        return cls(
            torch.cat([part.log_probs for part in parts]),
            torch.cat([part.entropy for part in parts]),
            **{name: scores(name) for name in SCORE_COLUMNS},
        )

    @property
    def probabilities(self) -> Tensor:
        """Probabilities `[N, K]` float64."""
        return self.log_probs.exp()

    def rows(self, questions: Sequence[Question], sets: PredictionSets | None = None) -> Iterator[dict[str, Any]]:
        """A prediction a row, as files have them: probabilities of the choices that a question has, and its scores.

        Args:
            questions: The questions.
            sets: Prediction sets, whose letters the rows then have too.
        """
        ids, counts = [question.id for question in questions], [len(question.choices) for question in questions]
        return self.rows_of(ids, counts, sets=sets)

    def rows_of(
        self,
        ids: Sequence[str],
        num_classes: Sequence[int],
        class_names: Sequence[str] = LETTERS,
        sets: PredictionSets | None = None,
    ) -> Iterator[dict[str, Any]]:
        """A prediction a row, of anything that has classes.

        Args:
            ids: What each row is called.
            num_classes: Number of classes of each row, the first ones.
            class_names: What each class is called.
            sets: Prediction sets, whose classes the rows then have too.
        """
        chosen = None if sets is None else sets(self.log_probs)
        for number, (identity, count) in enumerate(zip(ids, num_classes, strict=True)):
            probabilities = self.log_probs[number, :count].exp()
            row: dict[str, Any] = {
                "id": identity,
                "prediction": class_names[int(probabilities.argmax())],
                "probabilities": probabilities.tolist(),
                "entropy": float(self.entropy[number]),
            }
            if chosen is not None:
                row[SET_COLUMN] = [class_names[choice] for choice in chosen[number].nonzero().flatten().tolist()]
            for name in SCORE_COLUMNS:
                values = getattr(self, name)
                if values is not None and not bool(values[number].isnan()):  # JSON has no word for it
                    row[name] = float(values[number])
            yield row
