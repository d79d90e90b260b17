"""The covariance terms of a batch under several posteriors that are located in one model, from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from bmoe_lightning.curvature.factors import LayerFactors
from bmoe_lightning.experts.batch_parts import run_in_parts
from bmoe_lightning.experts.logits_contract import ClassLogits
from bmoe_lightning.laplace.binding import Binding
from bmoe_lightning.laplace.contrast_copies import terms_by_copies
from bmoe_lightning.laplace.covariance import BatchTerms, batch_terms
from bmoe_lightning.laplace.joined_terms import joined_terms


def shared_terms(
    bound: Sequence[Binding],
    model: nn.Module,
    class_logits: ClassLogits,
    batch: Any,
    *,
    centred: bool,
    by_group: bool,
) -> list[BatchTerms]:
    """The terms of a batch under each posterior; layers whose factors several of them share are computed once.

    A batch that does not fit in memory runs in parts; see `run_in_parts`. A batch of one short example runs as copies
    of it within `copied_examples`.

    Args:
        bound: The posteriors, located in the model. Of copies of the same factors on a device one is left.
        model: The model, locked by the caller.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: Batch that `class_logits` accepts.
        centred: Whether to centre the logits.
        by_group: Whether to return the terms of each group of slots too.
    """
    _share_copies(bound)
    layers = [list(zip(binding.layers, binding.factors, strict=True)) for binding in bound]
    copied = terms_by_copies(model, layers, class_logits, batch, by_group=by_group) if centred else None
    if copied is not None:
        return copied
    run = partial(
        batch_terms,
        model,
        layers,
        class_logits,
        centred=centred,
        # Once per model: whether it mixes examples depends on its code, not on the batch.
        thorough=not all(binding.owners_checked for binding in bound),
        by_group=by_group,
    )
    parts = run_in_parts(model, class_logits, batch, run, lambda found: found[0].logits, work="linearised prediction")
    for binding in bound:
        binding.owners_checked = binding.owners_checked or any(len(part[0].logits) > 1 for part in parts)
    return [joined_terms(of_parts) for of_parts in zip(*parts, strict=True)]


def _share_copies(bound: Sequence[Binding]) -> None:
    shared: dict[tuple[int, int, bool], LayerFactors] = {}
    for binding in bound:
        binding.factors = tuple(
            shared.setdefault((id(layer.a_basis), id(layer.g_basis), binding.offload), moved)
            for layer, moved in zip(binding.stored, binding.factors, strict=True)
        )
