"""Covariance of the class logits under the linearised model, without ever forming a Jacobian.

With `G_i = sum_s g_{s,i} a_s^T` over the slots of one example and expert,

    <G_i, G_j>    = sum_{s,t} (a_s . a_t) (g_{s,i} . g_{t,j})
    R_i           = U_g^T G_i U_a = sum_s (U_g^T g_{s,i}) (U_a^T a_s)^T                                   [r_g, r_a]
    Lambda_ij     = 1/lambda (<G_i, G_j> - sum_qp s_qp / (lambda + s_qp) R_{i,qp} R_{j,qp}),

summed over experts and layers. Shapes: `B` examples, `P` linear combinations of logits ("contrasts"), `S` slots of one
layer, `N` groups, a group being the slots of one example and expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.factors import LayerFactors
from bmoe_lightning.experts.grouped import ExpertGroups
from bmoe_lightning.experts.layer import ExpertLayer
from bmoe_lightning.experts.ownership import slot_owners
from bmoe_lightning.experts.taps import ClassLogits, tapped_batch

# Transient floats of one chunk of groups; bounds memory whatever the batch.
_CHUNK_FLOATS = 1 << 24


@dataclass(frozen=True)
class LayerTerms:
    """What one layer contributes to the covariance of a batch, for any prior precision.

    Attributes:
        prior: `[B, P, P]` float64, `<G_i, G_j>` summed over experts.
        projections: `[N, P, r_g, r_a]`, `R_i` of each group.
        examples: `[N]` int64, the example of each group.
        experts: `[N]` int64, the expert of each group.
    """

    prior: Tensor
    projections: Tensor
    examples: Tensor
    experts: Tensor


@dataclass(frozen=True)
class BatchTerms:
    """The covariance of a batch before the prior precision is known.

    Attributes:
        logits: `[B, K]` float64, `-inf` for absent classes.
        labels: `[B]` or None.
        embedding: `[B, K, P]` float64: the logits vary as `embedding @ contrasts`.
        layers: one entry a layer of the factors.
    """

    logits: Tensor
    labels: Tensor | None
    embedding: Tensor
    layers: tuple[LayerTerms, ...]


def batch_terms(
    model: nn.Module,
    layers: Sequence[ExpertLayer],
    factors: Sequence[LayerFactors],
    class_logits: ClassLogits,
    batch: Any,
    *,
    centred: bool,
    thorough: bool = False,
) -> BatchTerms:
    """Run one batch and gather what its logit covariance is made of.

    Args:
        model: the model.
        layers: its expert layers, one for each entry of `factors`.
        factors: curvature of these layers, on the model's device.
        class_logits: `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: whatever `class_logits` takes.
        centred: True takes K - 1 backward passes and describes the logits up to a common shift, which no softmax sees;
            False takes K and describes the logits themselves.
        thorough: whether to look for a mixing of examples in the whole model; see `slot_owners`.
    """
    with tapped_batch(model, layers, class_logits, batch) as tapped, torch.no_grad():
        weights, embedding = _contrasts(tapped.present, centred)
        slots = [tapped.taps.slots(position) for position in range(len(layers))]
        owners = slot_owners(tapped, slots, thorough=thorough)
        passes = [tapped.taps.gradients(tapped.logits, pass_weights) for pass_weights in weights]
        terms = []
        for position, layer_factors in enumerate(factors):
            gradients = [gradients_of_pass[position] for gradients_of_pass in passes]
            moves = torch.stack([gradient.any(dim=1) for gradient in gradients]).any(dim=0)
            moves &= slots[position].inputs.any(dim=1)
            if bool((owners[position][moves] < 0).any()):
                raise RuntimeError(
                    f"a slot of layer {layer_factors.name!r} moves a logit, but no example owns it: its gradients "
                    "cancel or underflow; try bfloat16 or float32 weights"
                )
            terms.append(
                layer_terms(
                    slots[position].inputs[moves],
                    torch.stack([gradient[moves] for gradient in gradients]),
                    owners[position][moves],
                    slots[position].experts[moves],
                    layer_factors,
                    len(embedding),
                )
            )
        logits = tapped.logits.detach().double().masked_fill(~tapped.present, -torch.inf)
        return BatchTerms(logits, tapped.labels, embedding, tuple(terms))


def _contrasts(present: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Weights of each backward pass `[P, B, K]`, and the embedding `[B, K, P]` of contrasts into logits, float64."""
    num_examples, num_classes = present.shape
    unit = torch.eye(num_classes, device=present.device, dtype=torch.float64)
    mask = present.double()
    if not centred:
        return (unit.unsqueeze(1) * mask), unit.expand(num_examples, -1, -1) * mask.unsqueeze(2)
    reference = present.int().argmax(dim=1)  # the first class an example has
    steps = torch.arange(1, num_classes, device=present.device)
    classes = (reference.unsqueeze(1) + steps) % num_classes  # [B, K - 1]
    has_class = mask.gather(1, classes)
    others = unit[classes] * has_class.unsqueeze(2)  # [B, K - 1, K]
    weights = others - unit[reference].unsqueeze(1) * has_class.unsqueeze(2)
    centring = torch.diag_embed(mask) - mask.unsqueeze(2) * mask.unsqueeze(1) / mask.sum(1).view(-1, 1, 1)
    return weights.transpose(0, 1), centring @ others.mT


def layer_terms(
    inputs: Tensor, gradients: Tensor, owners: Tensor, experts: Tensor, factors: LayerFactors, num_examples: int
) -> LayerTerms:
    """Reduce the slots of one layer to its covariance terms.

    Args:
        inputs: `[S, d_in]`.
        gradients: `[P, S, d_out]`.
        owners: `[S]` int64, example of each slot.
        experts: `[S]` int64.
        factors: the layer's curvature.
        num_examples: B.
    """
    dtype = torch.promote_types(factors.a_basis.dtype, torch.promote_types(inputs.dtype, torch.float32))
    keys, order = torch.sort(experts * num_examples + owners)
    inputs, gradients = inputs[order].to(dtype), gradients[:, order].to(dtype)
    groups, sizes = torch.unique_consecutive(keys, return_counts=True)
    num_contrasts = len(gradients)

    by_expert = ExpertGroups(experts[order], factors.num_experts)  # already sorted: its order is the identity
    projected_inputs = by_expert.matmul(inputs, factors.a_basis.to(dtype))
    projected_gradients = torch.stack([by_expert.matmul(g, factors.g_basis.to(dtype)) for g in gradients])

    prior = inputs.new_zeros(num_examples, num_contrasts, num_contrasts, dtype=torch.float64)
    ranks = (projected_gradients.shape[-1], projected_inputs.shape[-1])
    projections = inputs.new_zeros(len(groups), num_contrasts, *ranks)
    width = inputs.shape[1] + num_contrasts * gradients.shape[2]
    for chosen, rows, filled in _buckets(sizes, width, num_contrasts):
        a = inputs[rows] * filled.unsqueeze(2)  # [n, h, d_in]
        g = gradients[:, rows] * filled.unsqueeze(2)  # [P, n, h, d_out]
        flat = g.transpose(0, 1).flatten(1, 2)  # [n, P h, d_out]
        height = rows.shape[1]
        pairs = (flat @ flat.mT).view(len(chosen), num_contrasts, height, num_contrasts, height)
        kernel = torch.einsum("npsqt,nst->npq", pairs, a @ a.mT)
        prior.index_add_(0, groups[chosen] % num_examples, kernel.double())
        left = (projected_gradients[:, rows] * filled.unsqueeze(2)).permute(1, 0, 3, 2).flatten(1, 2)  # [n, P r_g, h]
        projections[chosen] = (left @ projected_inputs[rows]).view(len(chosen), num_contrasts, *ranks)
    return LayerTerms(prior, projections, groups % num_examples, groups // num_examples)


def _buckets(sizes: Tensor, width: int, num_contrasts: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pad groups of similar size to the same height.

    Args:
        sizes: `[N]` slots of each group; groups lie one after the other.
        width: floats that one padded slot takes.
        num_contrasts: P.

    Yields:
        Group indices `[n]`, slot rows `[n, h]` and which of them are real `[n, h]`.
    """
    starts = sizes.cumsum(0) - sizes
    # Heights 1, 2, 3, 4, 6, 8, 12, 16, ...: padding adds a third on average, with two heights an octave.
    exponent = sizes.double().log2().ceil()
    power = 2.0**exponent
    height = torch.where((sizes <= power * 0.75) & (power > 2), power * 0.75, power).long()
    for h in torch.unique(height).tolist():
        members = (height == h).nonzero().squeeze(1)
        floats = h * width + (h * num_contrasts) ** 2
        for chosen in members.split(max(1, _CHUNK_FLOATS // floats)):
            offset = torch.arange(h, device=sizes.device)
            filled = offset < sizes[chosen].unsqueeze(1)
            yield chosen, torch.where(filled, starts[chosen].unsqueeze(1) + offset, 0), filled


def covariance(terms: BatchTerms, curvature: Sequence[Tensor], prior_precision: Tensor) -> Tensor:
    """The logit covariance of a batch at given prior precisions.

    Args:
        terms: of the batch.
        curvature: `s_qp` of each layer, `[E, r_g, r_a]` float64.
        prior_precision: `[L]` float64, one a layer.

    Returns:
        `[B, K, K]` float64.

    Raises:
        ValueError: if the covariance is not positive semi-definite beyond rounding.
    """
    contrast = sum(
        layer_covariance(layer, s, precision)
        for layer, s, precision in zip(terms.layers, curvature, prior_precision.to(terms.embedding), strict=True)
    )
    scale = sum(layer.prior / precision for layer, precision in zip(terms.layers, prior_precision, strict=True))
    assert isinstance(contrast, Tensor)
    assert isinstance(scale, Tensor)
    _check_definite(contrast, scale)
    return terms.embedding @ contrast @ terms.embedding.mT


def layer_covariance(terms: LayerTerms, curvature: Tensor, prior_precision: Tensor) -> Tensor:
    """One layer's share of the covariance of the contrasts: `[B, P, P]` float64."""
    shrinkage = curvature / (prior_precision + curvature)
    projections = terms.projections.double()
    weighted = projections * shrinkage[terms.experts].unsqueeze(1)
    explained = weighted.flatten(2) @ projections.flatten(2).mT
    return (terms.prior.index_add(0, terms.examples, -explained)) / prior_precision


def _check_definite(contrast: Tensor, scale: Tensor) -> None:
    lowest = torch.linalg.eigvalsh(contrast)[:, 0]
    # The covariance is what is left of the prior's; rounding is relative to the latter.
    allowed = 1e-4 * scale.diagonal(dim1=1, dim2=2).sum(1)
    if bool((lowest < -allowed).any()) or not bool(torch.isfinite(contrast).all()):
        raise ValueError(
            f"the logit covariance has an eigenvalue of {lowest.min().item():.3g}, which is not rounding: the factors "
            "and the model do not belong together, or a value overflowed"
        )
