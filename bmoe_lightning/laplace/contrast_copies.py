"""Copies of a short example, one for each contrast, whose gradients one backward pass gives.

A linearised prediction takes a backward pass for each contrast of the logits. For one short example a pass takes
nearly as long as for a few of them: it reads all weights of its experts, or waits for the launch of its kernels. So the
example is copied, the model runs on the copies, and one backward pass differentiates another contrast for each of them.

The logits of a copy are those of the example up to rounding, and not bit for bit, so copies are made on request only.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.batch_copies import batch_rows
from bmoe_lightning.experts.batch_parts import num_rows, tensor_sizes
from bmoe_lightning.experts.counted_batch import CountedBatch
from bmoe_lightning.experts.fsdp import runs_in_lockstep
from bmoe_lightning.experts.logits_contract import ClassLogits, run_class_logits
from bmoe_lightning.experts.model_state import evaluation_mode
from bmoe_lightning.experts.ownership import slot_owners
from bmoe_lightning.experts.tapped_batches import TappedBatch, tapped_batch
from bmoe_lightning.experts.taps import Slots
from bmoe_lightning.laplace.covariance import BatchTerms, contrasts, layers_of, terms_of_posteriors
from bmoe_lightning.laplace.slot_terms import LayersWithFactors, reduced_slots
from bmoe_lightning.utils.devices import to_cpu
from bmoe_lightning.utils.messages import first_line

_most_tokens: ContextVar[int] = ContextVar("most tokens of a copied example", default=0)
_logger = logging.getLogger(__name__)
_FEWEST = 2  # contrasts: a single one takes a single pass anyway
_LEAST_ERROR = 1e-3  # of the spread of the logits


@dataclass
class _Known:
    """What is known of a model.

    Attributes:
        num_classes: Number of classes K of its logits; None before its first short example.
        checked: Whether it was checked that no layer of the model mixes rows or changes their order.
        refused: Whether its examples are not copied.
    """

    num_classes: int | None = None
    checked: bool = False
    refused: bool = False


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


class _NoCopiesError(Exception):
    """The model does not treat copies alike."""


@contextmanager
def copied_examples(most_tokens: int) -> Iterator[None]:
    """Within this context, linearised predictions of a single short example run on copies of it, in this thread.

    They take one backward pass in place of K - 1, and their logits and covariance are the same up to rounding.

    Args:
        most_tokens: Number of tokens of an example up to which it is copied: of the values of the largest tensor of its
            batch. 0 for no copies.

    Raises:
        ValueError: If it is negative.
    """
    if most_tokens < 0:
        raise ValueError(f"most_tokens must be at least 0, got {most_tokens}")
    token = _most_tokens.set(most_tokens)
    try:
        yield
    finally:
        _most_tokens.reset(token)


def terms_by_copies(
    model: nn.Module, posteriors: Sequence[LayersWithFactors], class_logits: ClassLogits, batch: Any, *, by_group: bool
) -> list[BatchTerms] | None:
    """The terms of a batch of one short example within `copied_examples`, from one forward and one backward pass.

    Before a model's first example the number of its classes is found by a plain forward pass. Gradients tell that each
    copy has its own row of the model's input. Where copies do not have the same logits and routes, or anything
    fails, the example is left to the passes of `batch_terms`.

    Args:
        model: The model.
        posteriors: Expert layers of the model and their curvature, for each posterior.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: Batch that `class_logits` accepts.
        by_group: Whether `GroupTerms` are returned too.

    Returns:
        Terms under each posterior, of the centred logits; None for other batches and models.
    """
    most = _most_tokens.get()
    if not most or isinstance(batch, CountedBatch) or num_rows(batch) != 1 or max(tensor_sizes(batch)) > most:
        return None
    known = _known.setdefault(model, _Known())
    if known.refused or runs_in_lockstep(model):
        return None
    try:
        return _terms(known, model, posteriors, class_logits, batch, by_group=by_group)
    except Exception as error:  # noqa: BLE001  (whatever copies raise: the example itself comes next)
        known.refused = True
        _logger.info("examples are not copied, and take one backward pass for each contrast: %s", first_line(error))
        return None


def _terms(
    known: _Known,
    model: nn.Module,
    posteriors: Sequence[LayersWithFactors],
    class_logits: ClassLogits,
    batch: Any,
    *,
    by_group: bool,
) -> list[BatchTerms] | None:
    if known.num_classes is None:
        with torch.no_grad(), evaluation_mode(model):
            logits, _ = run_class_logits(class_logits, model, batch)
        if len(logits) != 1:
            raise _NoCopiesError(f"a batch with one row has {len(logits)} examples")
        known.num_classes = logits.shape[1]
    count = known.num_classes - 1
    if count < _FEWEST:
        return None
    layers = layers_of(model, posteriors)
    with tapped_batch(model, layers, class_logits, batch_rows(batch, [0] * count, 1)) as tapped, torch.no_grad():
        if tapped.logits.shape != (count, known.num_classes) or tapped.taps.num_rows != count:
            raise _NoCopiesError(f"{count} copies have logits of shape {tuple(tapped.logits.shape)}")
        slots = [tapped.taps.slots(position) for position in range(len(layers))]
        _check_rows(tapped, slots, thorough=not known.checked)
        known.checked = True
        places = _places(tapped, slots, count)
        weights, embedding = contrasts(tapped.present[:1], True, tapped.most_classes)
        of_copies = torch.zeros_like(tapped.logits)
        of_copies[: len(weights)] = weights[:, 0].to(of_copies)
        gradients = tapped.taps.gradients(tapped.logits, of_copies)
        seen = []
        for layer, of_layer, gradient, at in zip(layers, slots, gradients, places, strict=True):
            first = Slots(of_layer.inputs[at[0]], of_layer.experts[at[0]], None)
            seen.append((first, [gradient[rows] for rows in at[: len(weights)]], torch.zeros_like(at[0]), layer))
        terms = reduced_slots(seen, posteriors, 1, by_group=by_group)
        logits = tapped.logits[:1].detach().double().masked_fill(~tapped.present[:1], -torch.inf)
        labels = tapped.labels[:1] if isinstance(tapped.labels, Tensor) else tapped.labels
        return terms_of_posteriors(terms, posteriors, logits, labels, embedding)


def _check_rows(tapped: TappedBatch, slots: Sequence[Slots], *, thorough: bool) -> None:
    """Check by gradients that the logits of each copy depend on the row of its number, and on no other one.

    Every time by the last layer, which is cheap and shows what `class_logits` does; once in all layers, where the
    model's own code decides.
    """
    owners = slot_owners(tapped, slots, thorough=thorough)
    same = []
    for of_layer, owner in zip(slots, owners, strict=True):
        if of_layer.rows is None:
            raise _NoCopiesError("the rows of the slots are unknown")
        same.append(((owner < 0) | (owner == of_layer.rows)).all().view(1))
    if not all(map(bool, to_cpu(same))):
        raise _NoCopiesError("class_logits changes the order of rows")


def _places(tapped: TappedBatch, slots: Sequence[Slots], count: int) -> list[Tensor]:
    """Positions `[count, S]` of the slots of each copy, for each layer.

    Within a layer the slots of one row are in the order of its tokens, or in that of experts and then tokens.

    Raises:
        _NoCopiesError: If the copies do not have the same logits, up to rounding, and the same routes.
    """
    eps = max(torch.finfo(of_layer.inputs.dtype).eps for of_layer in slots)
    values = torch.where(tapped.present, tapped.logits, tapped.logits.amax(1, keepdim=True))
    spread = values.amax() - values.amin()
    same = [((values - values[:1]).abs() <= max(_LEAST_ERROR, 8 * eps) * spread).all().view(1)]
    places = []
    for of_layer in slots:
        if of_layer.rows is None or len(of_layer.rows) % count:
            raise _NoCopiesError("slots have no rows, or copies not equally many")
        at = of_layer.rows.argsort(stable=True).view(count, -1)
        copies = torch.arange(count, device=at.device).unsqueeze(1)
        experts = of_layer.experts[at]
        same.append(((of_layer.rows[at] == copies) & (experts == experts[:1])).all().view(1))
        places.append(at)
    if not all(map(bool, to_cpu(same))):
        raise _NoCopiesError("copies have other logits or routes")
    return places
