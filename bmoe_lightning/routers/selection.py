"""Random choice of K distinct experts, and how sure a tempered gate is.

Adding Gumbel noise to the logits and taking the top K draws K experts without replacement, each next one in proportion
to its probability among those that are left (Plackett-Luce; Kool et al. 2019, https://arxiv.org/abs/1903.06059). The
noise is added once, and the sum is not made one-hot, where all but one expert would be ties and a batch would share
the ones that `topk` happens to return.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmoe_lightning.routers.scores import at_least_float32

Temperature = float | Tensor
"""A positive number, or one for each token, `[tokens]`."""


def sample_experts(logits: Tensor, gumbel: Tensor, top_k: int, temperature: Temperature = 1.0) -> Tensor:
    """Draw K distinct experts of each token from `softmax(logits / T)` without replacement.

    As T goes to zero, they become the K largest logits.

    Args:
        logits: `[tokens, N]`.
        gumbel: Standard Gumbel numbers, `[..., tokens, N]` float32.
        top_k: Number K of experts.
        temperature: Temperature T.

    Returns:
        Indices in the order in which they were drawn, `[..., tokens, K]` int64.
    """
    return (_tempered(logits, temperature) + gumbel).topk(top_k, dim=-1).indices


def log_probability(logits: Tensor, chosen: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """Log-probability that these experts are drawn in this order.

    Args:
        logits: `[tokens, N]`.
        chosen: Distinct experts in their order, `[..., tokens, K]`.
        temperature: Temperature T.

    Returns:
        `[..., tokens]`, differentiable in logits and temperature.
    """
    logits = _tempered(logits, temperature)
    logits = logits.expand(*chosen.shape[:-1], logits.shape[-1])
    drawn = logits.gather(-1, chosen)
    if chosen.shape[-1] == logits.shape[-1]:
        tail = drawn.flip(-1)
        left = tail.logcumsumexp(-1).flip(-1)
    else:
        rest = restrict(logits, chosen, inverse=True).logsumexp(-1, keepdim=True)
        left = torch.cat([rest, drawn.flip(-1)], -1).logcumsumexp(-1)[..., 1:].flip(-1)
    return (drawn - left).sum(-1)


def restrict(logits: Tensor, chosen: Tensor, *, inverse: bool = False) -> Tensor:
    """Logits with `-inf` for the experts that were not chosen.

    Put back into a softmax router that normalises its weights over the chosen experts, they make it choose these, with
    weights `softmax` over them.

    Args:
        logits: `[..., tokens, N]`, tempered or not.
        chosen: `[..., tokens, K]`.
        inverse: Whether the chosen ones are masked instead.
    """
    is_chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
    return logits.masked_fill(is_chosen if inverse else ~is_chosen, -torch.inf)


def gate_entropy(logits: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """Entropy of `softmax(logits / T)` in nats, `[tokens]`: 0 if it is one-hot, log N if it is uniform."""
    log_probs = _tempered(logits, temperature).log_softmax(-1)
    return torch.special.entr(log_probs.exp()).sum(-1)


def tempered_divergence(logits: Tensor, temperature: Temperature) -> Tensor:
    """Kullback-Leibler divergence of `softmax(logits / T)` from `softmax(logits)` in nats, `[tokens]`.

    Zero at T = 1, and bounded: by `-log max p` as T goes to zero, and by that of the uniform distribution as it grows.
    A penalty `-log T` has no such bound, and can be lowered for ever.
    """
    log_probs = _tempered(logits, temperature).log_softmax(-1)
    return (log_probs.exp() * (log_probs - at_least_float32(logits).log_softmax(-1))).sum(-1)


def _tempered(logits: Tensor, temperature: Temperature) -> Tensor:
    """In less than float32, sums with Gumbel noise would be rounded, and many of them be ties."""
    return at_least_float32(logits) / (
        temperature.unsqueeze(-1) if isinstance(temperature, Tensor) and temperature.dim() else temperature
    )
