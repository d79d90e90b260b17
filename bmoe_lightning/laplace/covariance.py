"""Covariance of the class logits under the linearised model, without forming a Jacobian.

The linearised predictive is that of Immer et al. 2021 (https://arxiv.org/abs/2008.08711). With `G_i = sum_s g_{s,i}
a_s^T` over the slots of one example and expert,

    <G_i, G_j>    = sum_{s,t} (a_s . a_t) (g_{s,i} . g_{t,j})
    R_i           = U_g^T G_i U_a = sum_s (U_g^T g_{s,i}) (U_a^T a_s)^T                                   [r_g, r_a]
    Lambda_ij     = 1/lambda (<G_i, G_j> - sum_qp s_qp / (lambda + s_qp) R_{i,qp} R_{j,qp}),

summed over experts and layers. Shapes: `B` examples, `P` linear combinations of logits ("contrasts"), `S` slots of one
layer, `N` groups, a group being the slots of one example and expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.logits_contract import ClassLogits
from bmoe_lightning.experts.ownership import slot_owners
from bmoe_lightning.experts.tapped_batches import tapped_batch
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.laplace.slot_terms import LayersWithFactors, LayerTerms, LayerTermsByFactors, reduced_slots

GRADIENT_BYTES = 1 << 33
"""Memory of the gradients of one batch in bytes: 8 GiB, or what those of five contrasts take; see `num_sweeps`."""

_FEW_CONTRASTS = 5
# Negative eigenvalues that are rounding, relative to the trace of the prior's covariance and to the terms of its sums.
_MISMATCH = 1e-4
_ROUNDING = 64 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class BatchTerms:
    """The covariance of a batch before the prior precision is known.

    Attributes:
        logits: Logits `[B, K]` float64, `-inf` for absent classes.
        labels: Labels as `class_logits` returned them, or None.
        embedding: Matrix `[B, K, P]` float64 from contrasts to logits. The contrasts of absent classes come last.
        layers: Terms of each layer of the factors.
    """

    logits: Tensor
    labels: Tensor | None
    embedding: Tensor
    layers: tuple[LayerTerms, ...]


def batch_terms(
    model: nn.Module,
    posteriors: Sequence[LayersWithFactors],
    class_logits: ClassLogits,
    batch: Any,
    *,
    centred: bool,
    thorough: bool = False,
    by_group: bool = False,
) -> list[BatchTerms]:
    """Run one batch and compute the terms of its logit covariance under one or several posteriors.

    Several posteriors share the forward pass, the backward passes and, where they cover the same layer, the inner
    products `<G_i, G_j>`.

    Args:
        model: The model.
        posteriors: Expert layers of the model and their curvature, for each posterior. Factors are copied to the device
            of each layer's slots if necessary.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: Batch that `class_logits` accepts, or a `CountedBatch`, of which only the counted examples are returned.
        centred: True takes K - 1 backward passes for the logits up to a common shift, to which the softmax is
            invariant, and fewer if no example has K classes; False takes K for the logits themselves.
        thorough: Whether to check on the full model that no layer mixes examples; see `slot_owners`.
        by_group: Whether `GroupTerms` are returned too.

    Returns:
        Terms under each posterior.

    Raises:
        RuntimeError: If a slot that affects a logit belongs to no example.
    """
    layers = layers_of(model, posteriors)
    with tapped_batch(model, layers, class_logits, batch) as tapped, torch.no_grad():
        weights, embedding = contrasts(tapped.present, centred, tapped.most_classes)
        weights = weights * tapped.counts(weights.device).unsqueeze(1)  # so that slots of other examples do not count
        num_examples = len(embedding)
        slots = [tapped.taps.slots(position) for position in range(len(layers))]
        owners = slot_owners(tapped, slots, thorough=thorough)
        itemsizes = [4 if tapped.taps.scale is not None else layer_slots.inputs.element_size() for layer_slots in slots]
        held = sum(len(s.experts) * x.d_out * size for s, x, size in zip(slots, layers, itemsizes, strict=True))
        count = tapped.taps.agreed_maximum(num_sweeps(len(weights), len(layers), held))
        every_pass = tapped.passes(weights)
        terms: LayerTermsByFactors = {}
        for part in torch.arange(len(layers)).tensor_split(count):
            positions = part.tolist()
            passes = [tapped.taps.gradients(tapped.logits, of_pass, positions) for of_pass in every_pass]
            del passes[len(weights) :]
            seen = [
                (slots[position], gradients, owners[position], layers[position])
                for position, gradients in zip(positions, zip(*passes, strict=True), strict=True)
            ]
            del passes
            terms |= reduced_slots(seen, posteriors, num_examples, by_group=by_group)
            del seen
        logits = tapped.logits.detach().double().masked_fill(~tapped.present, -torch.inf)
        found = terms_of_posteriors(terms, posteriors, logits, tapped.labels, embedding)
        return [_first(of_posterior, tapped.num_counted) for of_posterior in found]


def layers_of(model: nn.Module, posteriors: Sequence[LayersWithFactors]) -> list[ExpertLayer]:
    """The layers of one or several posteriors, in the order of the model: `slot_owners` reads the last one."""
    layers = list({layer.name: layer for posterior in posteriors for layer, _ in posterior}.values())
    if len(posteriors) > 1:  # those of one posterior are in this order
        position = {name: index for index, (name, _) in enumerate(model.named_modules())}
        layers.sort(key=lambda layer: (position[layer.module_name], not layer.is_first))
    return layers


def terms_of_posteriors(
    terms: LayerTermsByFactors,
    posteriors: Sequence[LayersWithFactors],
    logits: Tensor,
    labels: Any,
    embedding: Tensor,
) -> list[BatchTerms]:
    """The terms of a batch under each posterior, from those of layers; shapes as in `BatchTerms`."""
    return [
        BatchTerms(logits, labels, embedding, tuple(terms[x.name][id(f)] for x, f in posterior))
        for posterior in posteriors
    ]


def num_sweeps(num_contrasts: int, num_layers: int, gradient_bytes: int) -> int:
    """Number of groups of layers whose gradients are computed and reduced one group after another.

    The inner products need the gradients of all contrasts at once. So that their memory does not grow with the number
    of classes, the backward passes are then repeated for each group of layers, the earlier of which end early: n groups
    take about (n + 1) / 2 times as long. Up to six classes there is one group.

    Args:
        num_contrasts: Number of contrasts P.
        num_layers: Number of layers.
        gradient_bytes: Bytes of the gradients of one contrast in all layers.
    """
    allowed = max(GRADIENT_BYTES, _FEW_CONTRASTS * gradient_bytes)
    return max(1, min(num_layers, -(-num_contrasts * gradient_bytes // allowed)))


def _first(terms: BatchTerms, count: int) -> BatchTerms:
    """The terms of the first examples, if only these have slots."""
    layers = tuple(
        replace(
            layer,
            prior=layer.prior[:count],
            uncancelled=None if layer.uncancelled is None else layer.uncancelled[:count],
        )
        for layer in terms.layers
    )
    labels = None if terms.labels is None else terms.labels[:count]
    return BatchTerms(terms.logits[:count], labels, terms.embedding[:count], layers)


def without_absent_classes(terms: BatchTerms) -> BatchTerms:
    """Centred terms without the contrasts of classes that no example of the batch has."""
    count = max(int((terms.logits != -torch.inf).sum(1).max()) - 1, 1) if len(terms.logits) else 0
    if count >= terms.embedding.shape[2]:
        return terms
    layers = tuple(
        replace(layer, prior=layer.prior[:, :count, :count], projections=layer.projections[:, :count])
        for layer in terms.layers
    )
    return replace(terms, embedding=terms.embedding[:, :, :count], layers=layers)


def contrasts(present: Tensor, centred: bool, most_classes: int = 0) -> tuple[Tensor, Tensor]:
    """Weights of each backward pass `[P, B, K]`, and the embedding `[B, K, P]` of contrasts into logits, float64.

    Args:
        present: Mask `[B, K]`, False for absent classes.
        centred: Whether the contrasts are those of an example's classes with its first, followed by zeros, so that they
            do not depend on absent classes.
        most_classes: Number of classes that each example has at most, from which P follows; 0 is K.
    """
    num_examples, num_classes = present.shape
    unit = torch.eye(num_classes, device=present.device, dtype=torch.float64)
    mask = present.double()
    if not centred:
        return (unit.unsqueeze(1) * mask), unit.expand(num_examples, -1, -1) * mask.unsqueeze(2)
    classes = mask.argsort(dim=1, descending=True, stable=True)[:, : most_classes or None]  # those it has first
    reference, classes = classes[:, 0], classes[:, 1:]
    has_class = mask.gather(1, classes)
    others = unit[classes] * has_class.unsqueeze(2)  # [B, P, K]
    weights = others - unit[reference].unsqueeze(1) * has_class.unsqueeze(2)
    centring = torch.diag_embed(mask) - mask.unsqueeze(2) * mask.unsqueeze(1) / mask.sum(1).view(-1, 1, 1)
    return weights.transpose(0, 1), centring @ others.mT


def covariance(terms: BatchTerms, curvature: Sequence[Tensor], prior_precision: Tensor) -> Tensor:
    """The logit covariance of a batch at given prior precisions.

    Args:
        terms: Terms of the batch.
        curvature: Eigenvalues `s_qp` of each layer, `[E, r_g, r_a]` float64.
        prior_precision: Prior precision `[L]` float64, one value per layer.

    Returns:
        Covariance `[B, K, K]` float64.

    Raises:
        ValueError: If the covariance is not positive semi-definite beyond rounding.
    """
    # Each layer on its device; only the small covariance of the contrasts is moved.
    contrast = sum(
        layer_covariance(layer, s, precision).to(terms.embedding.device)
        for layer, s, precision in zip(terms.layers, curvature, prior_precision, strict=True)
    )
    # The covariance is the prior's minus the explained part, so its rounding error is relative to the prior's; where
    # the logits of an example are equal, as those of equal texts are, all of that is rounding.
    allowed = sum(
        _rounding(layer).to(terms.embedding) / precision
        for layer, precision in zip(terms.layers, prior_precision.to(terms.embedding), strict=True)
    )
    assert isinstance(contrast, Tensor)
    assert isinstance(allowed, Tensor)
    return terms.embedding @ _semidefinite(contrast, allowed) @ terms.embedding.mT


def prior_covariance(terms: BatchTerms, prior_precision: Tensor) -> Tensor:
    """The logit covariance of a batch under the prior, before any data: `[B, K, K]` float64.

    Args:
        terms: Terms of the batch.
        prior_precision: Prior precision `[L]` float64, one value per layer.
    """
    contrast = sum(
        layer.prior.to(terms.embedding) / precision
        for layer, precision in zip(terms.layers, prior_precision.to(terms.embedding), strict=True)
    )
    assert isinstance(contrast, Tensor)
    return terms.embedding @ contrast @ terms.embedding.mT


def layer_covariance(terms: LayerTerms, curvature: Tensor, prior_precision: Tensor) -> Tensor:
    """Contribution of one layer to the covariance of the contrasts: `[B, P, P]` float64."""
    explained = _explained(terms, curvature, prior_precision)
    return terms.prior.index_add(0, terms.examples, -explained) / prior_precision.to(explained)


def group_covariance(terms: LayerTerms, curvature: Tensor, prior_precision: Tensor) -> Tensor:
    """Contribution of each group to the covariance of the contrasts: `[N, P, P]` float64.

    Raises:
        ValueError: If the terms have no `GroupTerms`.
    """
    if terms.by_group is None:
        raise ValueError("the terms are sums over experts; compute them with by_group=True")
    explained = _explained(terms, curvature, prior_precision)
    return (terms.by_group.prior - explained) / prior_precision.to(explained)


def _explained(terms: LayerTerms, curvature: Tensor, prior_precision: Tensor) -> Tensor:
    """Lambda times what the data take from the prior covariance of each group: `[N, P, P]` float64."""
    projections = terms.projections.double()
    curvature = curvature.to(projections)
    prior_precision = prior_precision.to(projections)
    shrinkage = curvature / (prior_precision + curvature)
    weighted = projections * shrinkage[terms.experts].unsqueeze(1)
    return weighted.flatten(2) @ projections.flatten(2).mT


def _rounding(terms: LayerTerms) -> Tensor:
    """The most by which rounding lowers an eigenvalue at prior precision 1, `[B]` float64."""
    of_prior = _MISMATCH * terms.prior.diagonal(dim1=1, dim2=2).sum(1)
    return of_prior if terms.uncancelled is None else of_prior + _ROUNDING * terms.uncancelled


def _semidefinite(contrast: Tensor, allowed: Tensor) -> Tensor:
    """The covariances `[B, P, P]`, those with negative eigenvalues of a size that is allowed `[B]` without these."""
    values, vectors = torch.linalg.eigh(contrast.nan_to_num())
    lowest = values[:, 0]
    if bool((lowest < -allowed).any()) or not bool(torch.isfinite(contrast).all()):
        raise ValueError(
            f"the logit covariance has an eigenvalue of {lowest.min().item():.3g}, beyond rounding error: a value is "
            "not finite or too large, or the factors are not those of a curvature pass; check logits and factors"
        )
    clipped = (vectors * values.clamp(min=0).unsqueeze(1)) @ vectors.mT
    return torch.where((lowest < 0)[:, None, None], clipped, contrast)
