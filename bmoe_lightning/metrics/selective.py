"""Selective prediction: the error rate on the most confident examples.

El-Yaniv and Wiener 2010 (https://jmlr.org/papers/v11/el-yaniv10a.html); for neural networks Geifman and El-Yaniv 2017
(https://arxiv.org/abs/1705.08500).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmoe_lightning.metrics.inputs import check_predictions


def selective_risk(log_probs: Tensor, target: Tensor, coverages: Sequence[float]) -> Tensor:
    """Error rate among the most confident fraction of the examples.

    At coverage c the `ceil(c N)` most confident examples are answered. Ties in confidence count with their mean error,
    the expectation over their order.

    Args:
        log_probs: Normalised natural log-probabilities, `[N, K]`.
        target: Class indices, `[N]`.
        coverages: Fractions in (0, 1].

    Returns:
        Error rates `[len(coverages)]`, float64 in [0, 1].

    Raises:
        TypeError: If a tensor has the wrong dtype; see `check_predictions`.
        ValueError: If the predictions are refused, see `check_predictions`, or a coverage is out of range.
    """
    fractions = torch.tensor(list(coverages), dtype=torch.float64)
    if not bool(((fractions > 0) & (fractions <= 1)).all()):
        raise ValueError(f"coverages must lie in (0, 1], found {list(coverages)}")
    log_probs, target = check_predictions(log_probs, target)
    score, predicted = log_probs.max(dim=1)
    error = (predicted != target).double()
    # Negated, so that the sorted unique values run from the most confident down.
    _, group, size = torch.unique(-score, return_inverse=True, return_counts=True)
    mean_error = torch.zeros_like(size, dtype=torch.float64).scatter_add_(0, group, error) / size
    cumulative = mean_error.repeat_interleave(size).cumsum(0)
    # The small term keeps a product such as 0.07 * 100 = 7.000000000000001 from answering one more.
    answered = torch.ceil(fractions * len(target) - 1e-9).long().clamp(min=1).to(cumulative.device)
    return cumulative[answered - 1] / answered
