"""Averages of routing scores over samples of the logits, and the logits that give these averages.

In one pass, a random router routes by its mean score `1/S sum_s score(l^s)`, as in https://arxiv.org/abs/2509.23830 and
https://arxiv.org/abs/2603.09453. It is put back into the model as logits, so that the family's own code chooses experts
and weights by it. Averages are taken in log space and in float32 at least: an expert far from the choice keeps its
place in the order, and nothing underflows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bmoe_lightning.routers.types import Score


@dataclass(frozen=True)
class MeanScores:
    """Scores averaged over samples.

    Attributes:
        score: Score of the router.
        log_mean: Logarithm of the mean scores, `[tokens, N]`.
        log_mean_rest: Logarithm of the mean of one minus the score, `[tokens, N]`; None for a softmax. Without it, a
            mean near one would lose its distance from one.
    """

    score: Score
    log_mean: Tensor
    log_mean_rest: Tensor | None = None

    def logits(self, mean_logits: Tensor) -> Tensor:
        """Logits whose scores are the means.

        A softmax leaves their common shift open. They get the logsumexp of the mean logits, so that a z-loss does not
        vanish.

        Args:
            mean_logits: Logits at the mean of the samples' distribution, `[tokens, N]`.

        Returns:
            `[tokens, N]` in the dtype of `mean_logits`.
        """
        if self.log_mean_rest is not None:
            return (self.log_mean - self.log_mean_rest).to(mean_logits.dtype)
        shift = mean_logits.to(self.log_mean.dtype).logsumexp(-1, keepdim=True)
        return (self.log_mean + shift).to(mean_logits.dtype)


def mean_scores(samples: Iterable[Tensor], score: Score) -> MeanScores:
    """Average scores over samples that are made in chunks.

    Args:
        samples: Chunks `[S, tokens, N]` of the samples' logits; only one is held at a time.
        score: Score of the router.

    Raises:
        ValueError: If there is no sample, or the score is neither a softmax nor a sigmoid.
    """
    check_score(score)
    total: tuple[Tensor, ...] | None = None
    count = 0
    for chunk in samples:
        if not len(chunk):
            continue
        sums = tuple(part.logsumexp(0) for part in _log_scores(at_least_float32(chunk), score))
        total = sums if total is None else tuple(map(torch.logaddexp, total, sums))
        count += len(chunk)
    if total is None:
        raise ValueError("there is no sample of the logits to average over; draw at least one")
    log_count = torch.tensor(float(count), dtype=torch.float64).log().item()
    return MeanScores(score, *(part - log_count for part in total))


def log_scores(logits: Tensor, score: Score) -> Tensor:
    """Logarithm of the scores of `logits [..., N]`, in float32 at least.

    Raises:
        ValueError: If the score is neither a softmax nor a sigmoid.
    """
    check_score(score)
    return _log_scores(at_least_float32(logits), score)[0]


def check_score(score: Score | None) -> None:
    """Refuse a router whose scores cannot be averaged.

    Raises:
        ValueError: If the score is neither a softmax nor a sigmoid.
    """
    if score is None:
        raise ValueError("the router's score is not known; measure it with probe_routers")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(
            f"scores can be averaged in the router if they are a softmax or a sigmoid of its logits, and this router's "
            f"score is {score!r}; average predictions instead"
        )


def sample_chunks(num_samples: int, floats: int, limit: int = 1 << 22) -> Iterator[Sequence[int]]:
    """The numbers of the samples 0 .. S - 1, in chunks that bound the memory of what is made from them.

    Args:
        num_samples: Number of samples S.
        floats: Number of floats of one sample, such as tokens times N.
        limit: Number of floats to hold at a time; one sample is the least.
    """
    size = max(1, limit // max(1, floats))
    for start in range(0, num_samples, size):
        yield range(start, min(start + size, num_samples))


def _log_scores(logits: Tensor, score: Score) -> tuple[Tensor, ...]:
    """Logarithm of the scores, and for a sigmoid that of one minus the score."""
    if score == "softmax":
        return (logits.log_softmax(-1),)
    return F.logsigmoid(logits), F.logsigmoid(-logits)


def at_least_float32(values: Tensor) -> Tensor:
    """Logits in float32 at least: in less, their differences and what is added to them are rounded alike."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
