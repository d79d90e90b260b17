"""The slots of one layer, reduced to what its part of the logit covariance needs: `<G_i, G_j>` and `R_i`.

See `bmoe_lightning.laplace.covariance` for the formulas and the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.curvature.factors import LayerFactors, orthonormal
from bmoe_lightning.experts.taps import Slots
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.laplace.groups import SlotGroups, SlotKeys, group_slots, inner_products, on_device, padded_groups


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


LayersWithFactors = Sequence[tuple[ExpertLayer, LayerFactors]]
"""The layers of one posterior, each with its curvature."""

LayerTermsByFactors = dict[str, dict[int, LayerTerms]]
"""Terms by name of the layer and by the `id` of the factors."""


def reduced_slots(
    seen: Sequence[tuple[Slots, Sequence[Tensor], Tensor, ExpertLayer]],
    posteriors: Sequence[LayersWithFactors],
    num_examples: int,
    *,
    by_group: bool,
) -> LayerTermsByFactors:
    """The terms of some layers under the factors of each posterior that covers them.

    Args:
        seen: For each layer its slots, their gradients `[S, d_out]` of each contrast, their examples `[S]` int64
            (negative for none), and the layer.
        posteriors: Layers and curvature of each posterior.
        num_examples: Number of examples B.
        by_group: Whether `GroupTerms` are computed too.

    Raises:
        RuntimeError: If a slot that affects a logit belongs to no example.
    """
    terms: LayerTermsByFactors = {}
    grouped = group_slots([SlotKeys.of(s, g, owner, x.num_experts, num_examples) for s, g, owner, x in seen])
    for (slots, gradients, _, layer), groups in zip(seen, grouped, strict=True):
        if groups.num_orphans:
            raise RuntimeError(
                f"a slot of layer {layer.name!r} affects a logit, but belongs to no example, since its "
                "gradients cancel or underflow; try bfloat16 or float32 weights"
            )
        # By identity: posteriors over parts of the same layers share factors.
        factors = {id(f): f for posterior in posteriors for x, f in posterior if x.name == layer.name}
        found = layer_terms(slots.inputs, gradients, groups, list(factors.values()), num_examples, by_group=by_group)
        terms[layer.name] = dict(zip(factors, found, strict=True))
    return terms


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
