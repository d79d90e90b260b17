"""The labels of the Fisher, as weights for backward passes.

Every kind of Fisher is `E_y[delta delta^T]` with `delta = d log p(y|x) / d b`. Since `delta` is linear in the gradients
of the logits, each is a sum over P backward passes of weighted sums of logits: weights `[P, B, K]` whose outer products
over P sum to the `K x K` matrix of that Fisher for every example. With softmax outputs the exact Fisher equals the
generalised Gauss-Newton matrix (Martens 2014, https://arxiv.org/abs/1412.1193); the empirical one does not (Kunstner et
al. 2019, https://arxiv.org/abs/1905.12558). Shapes: `B` examples, `K` classes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bmoe_lightning.experts.logits_contract import checked_labels

FisherName = Literal["exact", "mc", "empirical"]
FISHERS = ("exact", "mc", "empirical")


def fisher_weights(
    kind: FisherName,
    log_probs: Tensor,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
    most_classes: int = 0,
) -> Tensor:
    """Weights of the logits in each backward pass.

    Args:
        kind: Kind of Fisher: `exact` (all classes, weighted by p: one pass less than an example has classes), `mc` (one
            sampled label: 1 pass) or `empirical` (the true label: 1 pass).
        log_probs: Log-probabilities `[B, K]` of the model, `-inf` for absent classes.
        labels: Labels `[B]`, required by `empirical`.
        generator: CPU generator, required by `mc`.
        most_classes: Number of classes that each example has at most, whichever these are; 0 is K.

    Returns:
        Weights `[P, B, K]` float64.

    Raises:
        ValueError: If `empirical` gets no labels or invalid ones, or the kind is unknown.
    """
    if kind == "exact":
        return _exact_weights(log_probs, most_classes or log_probs.shape[1])
    if kind == "mc":
        return label_weights(log_probs, _drawn_labels(log_probs, generator)).unsqueeze(0)
    if kind == "empirical":
        if labels is None:
            raise ValueError(
                "the empirical Fisher needs labels, but class_logits returned None for them; return (logits, labels)"
            )
        return label_weights(log_probs, checked_labels(labels, log_probs).to(log_probs.device)).unsqueeze(0)
    raise ValueError(f"unknown Fisher {kind!r}; valid are {', '.join(FISHERS)}")


def _drawn_labels(log_probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """A label `[B]` of each example, by one uniform number each, so that absent classes change none."""
    cumulative = log_probs.exp().cpu().cumsum(1)
    total = cumulative[:, -1:]
    uniform = torch.rand(len(total), 1, generator=generator, dtype=total.dtype)
    # Rounding must not reach the total, behind which there is no class.
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulative <= threshold).sum(1).to(log_probs.device)


def label_weights(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Derivative of `log p(label)` with respect to the logits: `[B, K]`, one-hot minus p.

    The entry of the label is the sum of the other probabilities, which is accurate when p is nearly 1.
    """
    others = log_probs.exp().scatter(1, labels.unsqueeze(1), 0)
    return (-others).scatter(1, labels.unsqueeze(1), others.sum(1, keepdim=True))


def _exact_weights(log_probs: Tensor, most_classes: int) -> Tensor:
    """Columns of a square root of `diag(p) - p p^T`, whose rows of absent classes are zero: `[C - 1, B, K]`."""
    # The classes that each example has come first, so that those columns of zeros take no backward pass.
    classes = (log_probs == -torch.inf).to(torch.uint8).argsort(dim=1, stable=True)[:, :most_classes]
    probs = log_probs.gather(1, classes).exp()
    outer = probs.unsqueeze(2) * probs.unsqueeze(1)
    outer = outer - torch.diag_embed(outer.diagonal(dim1=1, dim2=2))
    # The diagonal p (1 - p) as a sum of products: no cancellation when p is nearly 1.
    hessian = torch.diag_embed(outer.sum(2)) - outer
    values, vectors = torch.linalg.eigh(hessian)
    # The smallest eigenvalue is zero: its eigenvector is the common shift of all logits.
    root = vectors[..., 1:] * values[..., 1:].clamp(min=0).sqrt().unsqueeze(1)
    weights = root.permute(2, 0, 1)
    return weights.new_zeros(len(weights), *log_probs.shape).scatter(2, classes.expand_as(weights), weights)
