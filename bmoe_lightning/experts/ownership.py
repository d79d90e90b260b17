"""The example that each slot belongs to.

A model may arrange its tokens in any way: one row for each example, K rows, sorted rows, experts that are called on
`x[tokens]`. Gradients reveal whose logits depend on a slot: the logits of example n are weighted by a power of two that
depends on n, and the ratio of that gradient to the unweighted one gives n. Powers of two scale floating-point numbers
without rounding, so the ratio is exact.

Where the rows of a layer's tokens are known, the last such layer is enough to find the example of each row, and its
gradients are cheap. The other layers need their own gradients: a head that runs on chosen positions is cheap too, and
layers in the depth of the model take two backward passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bmoe_lightning.experts.tapped_batches import TappedBatch
from bmoe_lightning.experts.taps import Slots
from bmoe_lightning.utils.devices import to_cpu

_UNKNOWN = -1
_MIXED = -2


def slot_owners(batch: TappedBatch, slots: Sequence[Slots], *, thorough: bool = False) -> list[Tensor]:
    """Find the example of every slot that affects a logit.

    Args:
        batch: A tapped batch of B examples.
        slots: The slots of each tapped layer.
        thorough: Whether to check the other layers too, at the cost of two full backward passes. The last layer does
            not reveal whether lower layers mix examples or reorder tokens.

    Returns:
        One `[S]` int64 tensor for each layer: the example, or -1 where the slot affects no logit.

    Raises:
        RuntimeError: If a slot affects the logits of several examples.
    """
    num_examples = len(batch.logits)
    # Each condition decides about backward passes, which ranks with sharded weights must run in lockstep.
    most = batch.taps.agreed_maximum(num_examples)
    if most == 1:
        return [torch.zeros_like(layer_slots.experts) for layer_slots in slots]
    thorough = batch.taps.agreed_maximum(int(thorough)) == 1
    positions = range(len(slots))
    in_rows = _in_rows(batch, slots)
    if in_rows:
        examples = _examples_of_rows(batch, slots, in_rows, most)
        if batch.taps.agreed(examples is not None) and examples is not None:
            believed = not thorough or batch.taps.agreed(not _contradicted(batch, slots, in_rows, examples, most))
            if believed:
                others = [position for position in positions if position not in in_rows]
                owners = dict(zip(others, _unmixed_owners(batch, others, most), strict=True)) if others else {}
                return [owners[p] if p in owners else _at_rows(examples, slots[p]) for p in positions]
    return _unmixed_owners(batch, positions, most)


def _unmixed_owners(batch: TappedBatch, positions: Sequence[int], most: int) -> list[Tensor]:
    """Owners by gradients; raises `RuntimeError` if a slot affects the logits of several examples."""
    owners = _owners_by_gradient(batch, positions, most)
    if any(map(bool, to_cpu([(layer_owners == _MIXED).any().view(1) for layer_owners in owners]))):
        raise RuntimeError(
            "a token moves the logits of several examples (examples that share a sequence, or a layer that mixes the "
            "batch), so their covariance is no sum over examples. Give each example separate rows"
        )
    return owners


def _in_rows(batch: TappedBatch, slots: Sequence[Slots]) -> list[int]:
    """The positions of the layers whose tokens are in known rows, on all ranks in lockstep."""
    known = [layer_slots.rows is not None for layer_slots in slots]
    if batch.taps.agreed(all(known)):
        return list(range(len(slots)))
    return [position for position, here in enumerate(known) if batch.taps.agreed(here)]


def _examples_of_rows(batch: TappedBatch, slots: Sequence[Slots], in_rows: Sequence[int], most: int) -> Tensor | None:
    """The example of each row `[R]`, or None if it is ambiguous in the last layer that was reached."""
    last = max((position for position in in_rows if len(slots[position].inputs)), default=in_rows[-1])
    owners = _owners_by_gradient(batch, [last], most)[0]
    if bool((owners == _MIXED).any()):
        return None
    all_rows = slots[last].rows
    assert all_rows is not None
    known = owners != _UNKNOWN
    rows, owners = all_rows[known], owners[known]
    lowest = owners.new_full((batch.taps.num_rows,), len(batch.logits)).scatter_reduce(0, rows, owners, "amin")
    highest = owners.new_full((batch.taps.num_rows,), _UNKNOWN).scatter_reduce(0, rows, owners, "amax")
    return highest if torch.equal(lowest, highest) else None


def _contradicted(
    batch: TappedBatch, slots: Sequence[Slots], in_rows: Sequence[int], examples: Tensor, most: int
) -> bool:
    """Whether the gradients at any layer contradict the examples of the rows."""
    for position, owners in zip(in_rows, _owners_by_gradient(batch, in_rows, most), strict=True):
        if bool(((owners != _UNKNOWN) & (owners != _at_rows(examples, slots[position]))).any()):
            return True
    return False


def _at_rows(examples: Tensor, slots: Slots) -> Tensor:
    """The example of every slot, looked up by its row, on the slots' device."""
    assert slots.rows is not None
    return examples.to(slots.rows.device)[slots.rows]


def _owners_by_gradient(batch: TappedBatch, positions: Sequence[int], most: int) -> list[Tensor]:
    """Owners of the slots of some layers: an example, `_UNKNOWN` (affects no logit, or too little) or `_MIXED`.

    Args:
        batch: The batch.
        positions: Positions of the layers.
        most: Number of examples of the largest batch of ranks in lockstep, from which the number of passes follows.
    """
    logits = batch.logits
    num_examples, num_classes = logits.shape
    # Random weights: a slot that affects any logit almost surely affects their weighted sum, also where its effects on
    # several examples would add up to zero, as where the mean over the batch is subtracted.
    generator = torch.Generator().manual_seed(0)
    class_weights, example_weights = (
        1 + torch.rand(count, generator=generator, dtype=torch.float64).to(logits.device)
        for count in (num_classes, num_examples)
    )
    plain_weights = batch.present * class_weights * example_weights.unsqueeze(1)
    # Fewer examples in one pass in float16, which has fewer exponents.
    scale = batch.taps.scale
    base = 32 if scale is None else 8
    digits = _digits(most, base)[:, :num_examples].to(logits.device)

    plain = batch.taps.gradients(logits, plain_weights, positions)
    strongest = [gradient.abs().max(dim=1) for gradient in plain]
    # Numbers that float16 represents with fewer digits have no exact ratio.
    smallest = [batch.taps.smallest_gradient(position) for position in positions]
    faint = [peak.values < limit for peak, limit in zip(strongest, smallest, strict=True)]
    owners = [torch.zeros_like(peak.indices) for peak in strongest]
    mixed = [torch.zeros_like(peak.indices, dtype=torch.bool) for peak in strongest]
    for place, digit in enumerate(digits):
        scaled = batch.taps.gradients(logits, plain_weights * 2.0 ** digit.unsqueeze(1), positions)
        for layer, (gradient, peak) in enumerate(zip(scaled, strongest, strict=True)):
            value = _signed_peak(gradient, peak)
            if scale is not None:
                faint[layer] |= value.abs() < batch.taps.smallest_gradient(positions[layer])
            ratio = value / _signed_peak(plain[layer], peak)
            exponent = ratio.abs().log2()
            found = exponent.round()
            mixed[layer] |= ~(((exponent - found).abs() < 1e-2) & (ratio > 0) & (found >= 0) & (found < base))
            owners[layer] += found.nan_to_num(0, 0, 0).long().clamp(0, base - 1) * base**place
    return [
        torch.where(
            layer_faint | (peak.values == 0),
            _UNKNOWN,
            torch.where(layer_mixed | (layer_owners >= num_examples), _MIXED, layer_owners),
        )
        for layer_owners, layer_mixed, layer_faint, peak in zip(owners, mixed, faint, strongest, strict=True)
    ]


def _signed_peak(gradient: Tensor, peak: torch.return_types.max) -> Tensor:
    return gradient.gather(1, peak.indices.unsqueeze(1)).squeeze(1).double()


def _digits(count: int, base: int) -> Tensor:
    """The digits of 0 .. count - 1 in a base, least significant first: `[places, count]`."""
    numbers, places = torch.arange(count), []
    while True:
        places.append(numbers % base)
        numbers = numbers // base
        if not bool(numbers.any()):
            return torch.stack(places)
