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

from bmoe_lightning.curvature.factors import LayerFactors, orthonormal
from bmoe_lightning.experts.logits_contract import ClassLogits
from bmoe_lightning.experts.ownership import slot_owners
from bmoe_lightning.experts.tapped_batches import tapped_batch
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.laplace.groups import SlotGroups, SlotKeys, group_slots, inner_products, on_device, padded_groups

GRADIENT_BYTES = 1 << 33
"""Memory of the gradients of one batch in bytes: 8 GiB, or what those of five contrasts take; see `num_sweeps`."""

_FEW_CONTRASTS = 5
# Negative eigenvalues that are rounding, relative to the trace of the prior's covariance and to the terms of its sums.
_MISMATCH = 1e-4
_ROUNDING = 64 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class GroupTerms:
    """Terms of one layer by group.

    Attributes:
        prior: Inner products `<G_i, G_j>` of each group, `[N, P, P]` float64.
        sizes: Number of slots of each group, `[N]` int64.
    """

    prior: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class LayerTerms:
    """Terms of one layer in the covariance of a batch, for any prior precision.

    Attributes:
        prior: Inner products `<G_i, G_j>` summed over experts, `[B, P, P]` float64.
        projections: Projections `R_i` of each group, `[N, P, r_g, r_a]`.
        examples: Example of each group, `[N]` int64.
        experts: Expert of each group, `[N]` int64.
        by_group: What is only needed to attribute the variance to experts, if it was asked for.
        uncancelled: Sum of `|a_s|^2 |g_s|^2` over the slots of each example, for its first contrast, `[B]` float64.
            Inner products are sums of such terms, whose rounding errors stay where the terms cancel. None for terms
            whose covariance is not checked.
    """

    prior: Tensor
    projections: Tensor
    examples: Tensor
    experts: Tensor
    by_group: GroupTerms | None = None
    uncancelled: Tensor | None = None


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


LayersWithFactors = Sequence[tuple[ExpertLayer, LayerFactors]]
"""The layers of one posterior, each with its curvature."""


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
    union = {layer.name: layer for posterior in posteriors for layer, _ in posterior}
    layers = list(union.values())
    if len(posteriors) > 1:  # in model order, as within each posterior: slot_owners reads the last layer
        position = {name: index for index, (name, _) in enumerate(model.named_modules())}
        layers.sort(key=lambda layer: (position[layer.module_name], not layer.is_first))
    factors = {  # by identity: posteriors over parts of the same layers share them
        name: {id(f): f for posterior in posteriors for x, f in posterior if x.name == name} for name in union
    }
    with tapped_batch(model, layers, class_logits, batch) as tapped, torch.no_grad():
        weights, embedding = _contrasts(tapped.present, centred, tapped.most_classes)
        weights = weights * tapped.counts(weights.device).unsqueeze(1)  # so that slots of other examples do not count
        num_examples = len(embedding)
        slots = [tapped.taps.slots(position) for position in range(len(layers))]
        owners = slot_owners(tapped, slots, thorough=thorough)
        itemsizes = [4 if tapped.taps.scale is not None else layer_slots.inputs.element_size() for layer_slots in slots]
        held = sum(len(s.experts) * x.d_out * size for s, x, size in zip(slots, layers, itemsizes, strict=True))
        count = tapped.taps.agreed_maximum(num_sweeps(len(weights), len(layers), held))
        every_pass = tapped.passes(weights)
        terms: dict[str, dict[int, LayerTerms]] = {}
        for part in torch.arange(len(layers)).tensor_split(count):
            positions = part.tolist()
            passes = [tapped.taps.gradients(tapped.logits, of_pass, positions) for of_pass in every_pass]
            del passes[len(weights) :]
            seen = [
                (slots[position], gradients, owners[position], layers[position])
                for position, gradients in zip(positions, zip(*passes, strict=True), strict=True)
            ]
            del passes
            grouped = group_slots([SlotKeys.of(s, g, owner, x.num_experts, num_examples) for s, g, owner, x in seen])
            for (layer_slots, gradients, _, layer), groups in zip(seen, grouped, strict=True):
                if groups.num_orphans:
                    raise RuntimeError(
                        f"a slot of layer {layer.name!r} affects a logit, but belongs to no example, since its "
                        "gradients cancel or underflow; try bfloat16 or float32 weights"
                    )
                of_layer = factors[layer.name]
                found = layer_terms(
                    layer_slots.inputs, gradients, groups, list(of_layer.values()), num_examples, by_group=by_group
                )
                terms[layer.name] = dict(zip(of_layer, found, strict=True))
            del seen, gradients, layer_slots
        logits = tapped.logits.detach().double().masked_fill(~tapped.present, -torch.inf)
        return [
            _first(
                BatchTerms(logits, tapped.labels, embedding, tuple(terms[x.name][id(f)] for x, f in posterior)),
                tapped.num_counted,
            )
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


def _contrasts(present: Tensor, centred: bool, most_classes: int = 0) -> tuple[Tensor, Tensor]:
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


def layer_terms(
    inputs: Tensor,
    gradients: Sequence[Tensor],
    groups: SlotGroups,
    factors: Sequence[LayerFactors],
    num_examples: int,
    *,
    by_group: bool = False,
) -> list[LayerTerms]:
    """Reduce the slots of one layer to its covariance terms, under each of several curvatures.

    Args:
        inputs: Inputs `[S, d_in]` of the slots.
        gradients: Gradients `[S, d_out]` of the P contrasts.
        groups: Groups of the slots.
        factors: Curvatures of this layer, one or more.
        num_examples: Number of examples B.
        by_group: Whether `GroupTerms` are returned too.
    """
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    for layer in factors:
        dtype = torch.promote_types(layer.a_basis.dtype, dtype)
    num_contrasts, d_out = len(gradients), gradients[0].shape[1]
    bases = [
        tuple(orthonormal(basis.to(inputs.device), dtype) for basis in (layer.a_basis, layer.g_basis))
        for layer in factors
    ]
    keys = on_device(groups.keys, inputs.device)
    experts = keys // num_examples
    prior = inputs.new_zeros(num_examples, num_contrasts, num_contrasts, dtype=torch.float64)
    uncancelled = inputs.new_zeros(num_examples, dtype=torch.float64)
    kept = None
    if by_group:
        products_of_group = prior.new_zeros(len(keys), num_contrasts, num_contrasts)
        kept = GroupTerms(products_of_group, on_device(groups.sizes, inputs.device))
    projections = [
        a_basis.new_zeros(len(keys), num_contrasts, g_basis.shape[2], a_basis.shape[2]) for a_basis, g_basis in bases
    ]
    for chosen, rows, filled in padded_groups(groups, inputs.shape[1], (num_contrasts, d_out), inputs.device):
        slots = groups.order[rows]
        # The inputs of padding are zero, so it adds nothing for any finite gradient.
        a = inputs[slots].to(dtype) * filled.unsqueeze(2)  # [n, h, d_in]
        g = _gathered(gradients, slots, dtype)  # [P, n, h, d_out]
        products = inner_products(a, g).double()
        prior.index_add_(0, keys[chosen] % num_examples, products)
        norms = a.square().sum(2) * g[0].square().sum(2)  # [n, h]
        uncancelled.index_add_(0, keys[chosen] % num_examples, norms.double().sum(1))
        if kept is not None:
            kept.prior[chosen] = products
        of_groups = experts[chosen]
        for (a_basis, g_basis), projection in zip(bases, projections, strict=True):
            if a_basis.shape[2] and g_basis.shape[2]:
                projected = (g @ g_basis[of_groups]).mT @ (a @ a_basis[of_groups])
                projection[chosen] = projected.transpose(0, 1)
    examples = keys % num_examples
    return [LayerTerms(prior, projection, examples, experts, kept, uncancelled) for projection in projections]


def _gathered(gradients: Sequence[Tensor], slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradients of the given slots for all contrasts: `[P, *slots.shape, d_out]`."""
    d_out = gradients[0].shape[1]
    gathered = gradients[0].new_empty(len(gradients), slots.numel(), d_out, dtype=dtype)
    for gradient, rows in zip(gradients, gathered, strict=True):
        if gradient.dtype == dtype:
            torch.index_select(gradient, 0, slots.flatten(), out=rows)
        else:
            rows.copy_(gradient[slots.flatten()])
    return gathered.unflatten(1, slots.shape)


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
