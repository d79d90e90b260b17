"""Scores of how uncertain written answers are; **higher is more uncertain**.

The direction of each score is fixed here and never found from data. `bmoe_lightning.metrics.detect_errors` and
`rejection_ratio_interval` say what a score is worth. Shapes: `B` texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bmoe_lightning.laplace.posterior import LaplacePosterior
from bmoe_lightning.laplace.sequences import text_variance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bmoe_lightning.models import TextScores


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """What model and posterior say of answers.

    Attributes:
        log_prob: `log p(y | x)`, `[B]`, in nats.
        num_tokens: Number of tokens of each answer, `[B]` int64.
        token_entropy: Mean entropy of the next-token distribution over the answer's tokens, `[B]`, in nats.
        variance: Variance of `log p(y | x)` under the posterior, `[B]`.
        isotropic: The same with covariance 1 of every weight: the squared norm of the gradient, `[B]`.
    """

    log_prob: Tensor
    num_tokens: Tensor
    token_entropy: Tensor
    variance: Tensor
    isotropic: Tensor

    def uncertainties(self) -> dict[str, Tensor]:
        """All scores by name, `[B]` float64 each, higher is more uncertain; see `ANSWER_SCORES`."""
        return {name: score(self).double() for name, score in _SCORES.items()}


_SCORES: Mapping[str, Callable[[AnswerScores], Tensor]] = {
    "sequence_probability": lambda found: -found.log_prob,
    "length_normalised": lambda found: -found.log_prob.double() / found.num_tokens,
    "token_entropy": lambda found: found.token_entropy,
    "posterior_variance": lambda found: found.variance,
    "isotropic_variance": lambda found: found.isotropic,
    "variance_ratio": lambda found: torch.where(found.isotropic > 0, found.variance / found.isotropic, 0),
    "lower_bound": lambda found: found.variance.sqrt() - found.log_prob,
}

ANSWER_SCORES = tuple(_SCORES)
"""Names of the scores, all higher where an answer is more uncertain.

- `sequence_probability`: `-log p(y | x)`.
- `length_normalised`: the same for each token.
- `token_entropy`: mean entropy of the tokens.
- `posterior_variance`: variance of `log p(y | x)` under the posterior.
- `isotropic_variance`: the same under covariance 1 of every weight, without a curvature pass.
- `variance_ratio`: the former over the latter, the share that data left; 0 where no weight matters.
- `lower_bound`: `-log p(y | x)` plus its standard deviation: how low the log-probability may be.
"""


def score_answers(model: PreTrainedModel, batch: Mapping[str, Tensor], posterior: LaplacePosterior) -> AnswerScores:
    """Score the answers of a batch of texts, in one forward and one backward pass for all of them.

    Args:
        model: Causal language model that the posterior was fitted to.
        batch: Texts as `bmoe_lightning.models.text_scores` takes them, such as `GeneratedAnswers.batch`.
        posterior: The posterior.

    Raises:
        WeightMismatchError: If the model's weights are not those that the curvature was collected on.
        ValueError: As `text_scores`.
    """
    # Imported late: serving a posterior needs no transformers.
    from bmoe_lightning.models.sequence_logits import text_scores

    last: list[TextScores] = []

    def log_prob(model: Any, batch: Any) -> Tensor:
        last.append(text_scores(model, batch))
        return last[-1].log_prob

    def keep(_log_prob: Tensor) -> Tensor:
        scores = last.pop()  # whose graph is not held beyond its batch
        values = (scores.log_prob, scores.token_entropy, scores.num_tokens)
        return torch.stack([value.detach().to(scores.log_prob.dtype) for value in values], dim=1)

    values, variance, isotropic = text_variance(posterior, model, log_prob, keep, batch)
    log_probs, entropies, counts = values.unbind(1)
    return AnswerScores(log_probs, counts.long(), entropies, variance, isotropic)
