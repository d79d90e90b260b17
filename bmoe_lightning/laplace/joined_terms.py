"""The covariance terms of a batch from those of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from bmoe_lightning.experts.batch_parts import joined_labels
from bmoe_lightning.experts.logits_contract import joined_logits
from bmoe_lightning.laplace.covariance import BatchTerms
from bmoe_lightning.laplace.slot_terms import GroupTerms, LayerTerms


def joined_terms(parts: Sequence[BatchTerms]) -> BatchTerms:
    """Join the terms of parts of a batch, in order.

    Parts may have other numbers of classes K and of contrasts P, those that their examples have at most; what is
    missing is absent classes and contrasts of zero.

    Args:
        parts: Terms under the same curvature, computed with the same options.
    """
    if len(parts) == 1:
        return parts[0]
    classes = max(part.logits.shape[1] for part in parts)
    contrasts = max(part.embedding.shape[2] for part in parts)
    begins = [0, *accumulate(len(part.logits) for part in parts)]
    layers = [
        _joined_layer(of_parts, begins, contrasts) for of_parts in zip(*(part.layers for part in parts), strict=True)
    ]
    return BatchTerms(
        joined_logits([part.logits for part in parts]),
        joined_labels([part.labels for part in parts]),
        torch.cat([_padded(part.embedding, (classes, contrasts)) for part in parts]),
        tuple(layers),
    )


def _joined_layer(parts: Sequence[LayerTerms], begins: Sequence[int], contrasts: int) -> LayerTerms:
    square = (contrasts, contrasts)
    groups, uncancelled = [part.by_group for part in parts], [part.uncancelled for part in parts]
    known_groups = [group for group in groups if group is not None]
    known = [values for values in uncancelled if values is not None]
    return replace(
        parts[0],
        prior=torch.cat([_padded(part.prior, square) for part in parts]),
        projections=torch.cat([_padded(p.projections, (contrasts, *p.projections.shape[2:])) for p in parts]),
        examples=torch.cat([part.examples + begin for part, begin in zip(parts, begins, strict=False)]),
        experts=torch.cat([part.experts for part in parts]),
        by_group=GroupTerms(
            torch.cat([_padded(group.prior, square) for group in known_groups]),
            torch.cat([group.sizes for group in known_groups]),
        )
        if known_groups
        else None,
        uncancelled=torch.cat(known) if known else None,
    )


def _padded(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Values with zeros at the end of all axes but the first."""
    missing = [size - length for size, length in zip(sizes, values.shape[1:], strict=True)]
    return pad(values, [amount for gap in reversed(missing) for amount in (0, gap)]) if any(missing) else values
