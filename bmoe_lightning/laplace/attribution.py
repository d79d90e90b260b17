"""Attribution of the predictive variance to layers and experts.

The logit covariance is a sum over experts, `Lambda = sum_{l,e} Lambda_{l,e}`, and each summand is positive
semi-definite. So the mean variance of the centred logits of an example,

    v = tr(C Lambda C) / (K - 1),   C = I - 11^T / K,

is a sum of non-negative parts, one for each expert that the example's tokens were routed to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.curvature.factors import LayerFactors
from bmoe_lightning.laplace.covariance import BatchTerms, group_covariance
from bmoe_lightning.laplace.slot_terms import LayerTerms


@dataclass(frozen=True)
class LayerAttribution:
    """The part of one expert layer in the variance of each example of a batch.

    Attributes:
        name: Name of the expert layer.
        index: Index among the model's expert layers.
        variance: Part of each expert in the mean variance of the centred logits, `[B, E]` float64, in logits squared;
            at least 0 up to rounding, and exactly 0 for an expert that no counted token of the example was routed to.
        slots: Number of counted routed tokens, `[B, E]` int64.
    """

    name: str
    index: int
    variance: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Attribution:
    """The parts of all expert layers in the variance of each example of a batch, on the CPU.

    Attributes:
        layers: The part of each layer of the posterior.
    """

    layers: tuple[LayerAttribution, ...]

    @property
    def by_layer(self) -> Tensor:
        """The part of each layer, `[B, L]` float64."""
        return torch.stack([layer.variance.sum(1) for layer in self.layers], dim=1)

    @property
    def total(self) -> Tensor:
        """The mean variance of the centred logits, `[B]` float64: that of the links `isotropic` and `probit`."""
        return self.by_layer.sum(1)

    @classmethod
    def joined(cls, parts: Sequence[Attribution]) -> Attribution:
        """The attribution of several batches as one.

        Args:
            parts: Attributions of the same posterior, one per batch, at least one.
        """
        return cls(
            tuple(
                LayerAttribution(
                    of_layer[0].name,
                    of_layer[0].index,
                    torch.cat([layer.variance for layer in of_layer]),
                    torch.cat([layer.slots for layer in of_layer]),
                )
                for of_layer in zip(*(part.layers for part in parts), strict=True)
            )
        )


def attributed(terms: BatchTerms, layers: Sequence[LayerFactors], prior_precision: Tensor) -> Attribution:
    """The part of each layer and expert in the variance of each example.

    Args:
        terms: Centred terms of the batch, with `GroupTerms`.
        layers: Factors of each layer.
        prior_precision: Prior precision of each layer, `[L]` float64.

    Raises:
        ValueError: If the terms have no `GroupTerms`.
    """
    parts = zip(layers, terms.layers, prior_precision, strict=True)
    return Attribution(tuple(_attributed_layer(terms, found, layer, value) for layer, found, value in parts))


def _attributed_layer(
    terms: BatchTerms, found: LayerTerms, layer: LayerFactors, prior_precision: Tensor
) -> LayerAttribution:
    covariance = group_covariance(found, layer.curvature(), prior_precision)  # [N, P, P]
    embedding = terms.embedding.to(covariance)
    metric = embedding.mT @ embedding  # tr(C Lambda C) = tr(metric Lambda) for the covariance of the contrasts
    degrees = ((terms.logits != -torch.inf).sum(1) - 1).clamp(min=1).to(covariance)
    parts = (metric[found.examples] * covariance).sum((1, 2)) / degrees[found.examples]
    places, shape = (found.examples, found.experts), (len(terms.logits), layer.num_experts)
    variance = parts.new_zeros(shape).index_put_(places, parts)
    assert found.by_group is not None  # or group_covariance would have raised
    sizes = found.by_group.sizes
    slots = sizes.new_zeros(shape).index_put_(places, sizes)
    return LayerAttribution(layer.name, layer.index, variance.cpu(), slots.cpu())
