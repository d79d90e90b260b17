"""Grouping of slots by example and expert, and the inner products of their weight gradients.

With `G_p = sum_s g_{s,p} a_s^T` over the slots of one group, `<G_p, G_q>` is computed in one of two ways, whichever
takes fewer operations:

    sum_s g_{s,p} . sum_t (a_s . a_t) g_{t,q}        h^2 (d_in + P d_out) + P^2 h d_out, for a group of h slots
    G_p : G_q, materialised                          P h d_in d_out + P^2 d_in d_out.

The first is for the many small groups of routed experts, the second for layers that process every token. Group sizes
are computed on the device and copied to the CPU for all layers at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bmoe_lightning.experts.taps import Slots
from bmoe_lightning.utils.devices import to_cpu

# Temporary floats per chunk of groups: bounds memory for any batch size.
_CHUNK_FLOATS = 1 << 24
_SMALL_FLOATS = 1 << 18


@dataclass(frozen=True)
class SlotKeys:
    """The group of each slot of a layer, on the device.

    Attributes:
        keys: Group `[S]` int64 of each slot: `expert * B + example`, or E B for a slot that does not count.
        counts: Counts `[E B + 2]` int64: slots of each group, slots that do not count, and slots that affect a logit
            but have no owner.
    """

    keys: Tensor
    counts: Tensor

    @classmethod
    def of(
        cls, slots: Slots, gradients: Sequence[Tensor], owners: Tensor, num_experts: int, num_examples: int
    ) -> SlotKeys:
        """Group the slots of one layer.

        Args:
            slots: The S slots.
            gradients: Gradients `[S, d_out]` of the P contrasts. A slot counts when one of its weight gradients is not
                exactly zero.
            owners: Example of each slot, `[S]` int64; negative for none.
            num_experts: Number of experts E.
            num_examples: Number of examples B.
        """
        moves = torch.stack([gradient.any(dim=1) for gradient in gradients]).any(dim=0) & slots.inputs.any(dim=1)
        none = num_experts * num_examples
        keys = torch.where(moves & (owners >= 0), slots.experts * num_examples + owners, none)
        counts = torch.zeros(none + 2, dtype=torch.int64, device=keys.device)
        counts.scatter_add_(0, keys, torch.ones_like(keys))
        counts[none + 1] = (moves & (owners < 0)).sum()
        return cls(keys, counts)


@dataclass(frozen=True)
class SlotGroups:
    """The counted slots of one layer, sorted by group.

    Attributes:
        order: Indices `[n]` int64 of the slots on the device, contiguous within a group.
        keys: Key `[N]`, `expert * B + example`, of each non-empty group, ascending.
        sizes: Number of slots `[N]` of each group.
        num_orphans: Number of slots that affect a logit but have no owner.
    """

    order: Tensor
    keys: NDArray[np.int64]
    sizes: NDArray[np.int64]
    num_orphans: int


def group_slots(layers: Sequence[SlotKeys]) -> list[SlotGroups]:
    """Sort the slots of all layers, with one synchronisation per device."""
    grouped = []
    for layer, counts in zip(layers, to_cpu([layer.counts for layer in layers]), strict=True):
        counted = counts.numpy()
        groups = counted[:-2]
        keys = np.flatnonzero(groups)
        order = torch.argsort(layer.keys, stable=True)[: int(groups.sum())]
        grouped.append(SlotGroups(order, keys, groups[keys], int(counted[-1])))
    return grouped


def padded_groups(
    groups: SlotGroups, d_in: int, contrasts: Sequence[int], device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pad groups of similar size to the same height.

    Args:
        groups: The N groups.
        d_in: Width of a slot's input.
        contrasts: Number of contrasts P, and d_out.
        device: Device of the yielded indices.

    Yields:
        Group indices `[n]`; positions in `groups.order`, `[n, h]`; and a mask `[n, h]` that is False for padding, whose
        positions are those of an arbitrary slot.
    """
    sizes = groups.sizes
    starts = sizes.cumsum(0) - sizes
    num_contrasts, d_out = contrasts
    # Heights 1, 2, 3, 4, 6, 8, 12, 16, ...: two heights per octave, so that padding adds at most a third.
    power = 2 ** np.ceil(np.log2(sizes)).astype(np.int64)
    height = np.where((4 * sizes <= 3 * power) & (power > 2), 3 * power // 4, power)
    height = _merged(height, d_in + 2 * num_contrasts * d_out)
    for h in np.unique(height).tolist():
        members = np.flatnonzero(height == h)
        at_a_time = max(1, _CHUNK_FLOATS // (h * (d_in + 2 * num_contrasts * d_out + h)))
        for first in range(0, len(members), at_a_time):
            chosen = members[first : first + at_a_time]
            filled = np.arange(h) < sizes[chosen, None]
            rows = np.where(filled, starts[chosen, None] + np.arange(h), 0)
            yield on_device(chosen, device), on_device(rows, device), on_device(filled, device)


def _merged(height: NDArray[np.int64], floats: int) -> NDArray[np.int64]:
    """Heights of which the lower ones are lifted to the next where all that are padded to it are small together.

    Padding then costs less than another iteration.

    Args:
        height: Height `[N]` of each group.
        floats: Number of temporary floats of a slot.
    """
    for h, following in itertools.pairwise(np.unique(height).tolist()):
        lifted = height == h
        if (lifted | (height == following)).sum() * following * floats <= _SMALL_FLOATS:
            height = np.where(lifted, following, height)
    return height


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A small array as a tensor on a device, without synchronisation."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def inner_products(a: Tensor, g: Tensor) -> Tensor:
    """`<G_p, G_q>` of each group.

    Args:
        a: Inputs `[n, h, d_in]` of n groups of h slots.
        g: Gradients `[P, n, h, d_out]`.

    Returns:
        Inner products `[n, P, P]`.
    """
    num_contrasts, _, height, d_out = g.shape
    d_in = a.shape[2]
    by_pairs = height**2 * (d_in + num_contrasts * d_out) + num_contrasts**2 * height * d_out
    written_out = num_contrasts * (height + num_contrasts) * d_in * d_out
    return _by_pairs(a, g) if by_pairs <= written_out else _written_out(a, g)


def _by_pairs(a: Tensor, g: Tensor) -> Tensor:
    summed = (a @ a.mT) @ g  # [P, n, h, d_out]
    return g.flatten(2).transpose(0, 1) @ summed.flatten(2).permute(1, 2, 0)


def _written_out(a: Tensor, g: Tensor) -> Tensor:
    num_contrasts, count = g.shape[:2]
    total = a.new_zeros(count, num_contrasts, num_contrasts)
    # A few rows of G at a time: the full matrix is as large as the weight.
    for rows in g.split(max(1, _CHUNK_FLOATS // (count * num_contrasts * a.shape[2])), dim=3):
        flat = (rows.mT @ a).flatten(2).transpose(0, 1)  # [n, P, rows d_in]
        total += flat @ flat.mT
    return total
