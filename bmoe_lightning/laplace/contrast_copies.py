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
from bmoe_lightning.experts.logits_contract import ClassLogits, present_classes, run_class_logits
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
# Rounding relative to the spread of logits or the largest input; beyond these dtypes a multiple of eps.
_ROUNDING = {torch.bfloat16: 0.06, torch.float16: 0.01}
_EPS = 1000


@dataclass
class _Known:
    """What is known of a model and a function of its logits.

    Attributes:
        num_classes: Number of classes K of its logits; None before its first short example.
        checked: Names of the layers of which it was checked that they do not mix rows or change their order.
        refused: Whether its examples are not copied.
    """

    num_classes: int | None = None
    checked: frozenset[str] = frozenset()
    refused: bool = False


_Functions = weakref.WeakKeyDictionary[Any, dict[Any, _Known]]
# By model, and by function or by instance and method.
_known: weakref.WeakKeyDictionary[nn.Module, _Functions] = weakref.WeakKeyDictionary()


class _NoCopiesError(Exception):
    """The model, or the function of its logits, does not treat copies as it treats the example."""


@contextmanager
def copied_examples(most_tokens: int) -> Iterator[None]:
    """Within this context, linearised predictions of a single short example run on copies of it, in this thread.

    They take one backward pass in place of K - 1, and their logits and covariance are the same up to rounding.

    Args:
        most_tokens: Number of tokens of an example up to which it is copied: of the values of the largest tensor of its
            batch. 0 for no copies.

    Raises:
        ValueError: If it is no integer of at least 0.
    """
    if type(most_tokens) is not int or most_tokens < 0:
        raise ValueError(f"most_tokens must be an integer of at least 0, got {most_tokens!r}")
    token = _most_tokens.set(most_tokens)
    try:
        yield
    finally:
        _most_tokens.reset(token)


def terms_by_copies(
    model: nn.Module, posteriors: Sequence[LayersWithFactors], class_logits: ClassLogits, batch: Any, *, by_group: bool
) -> list[BatchTerms] | None:
    """The terms of a batch of one short example within `copied_examples`, from one forward and one backward pass.

    The first example of a model and a function of its logits also takes a plain forward pass, with whose logits those
    of the copies are compared. Gradients tell that each copy has its own row of the model's input. Where copies have
    other logits or routes, or anything fails, examples are left to the passes of `batch_terms`, with one line in the
    log.

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
    if not most or isinstance(batch, CountedBatch) or num_rows(batch) != 1 or runs_in_lockstep(model):
        return None
    known = _known_of(model, class_logits)
    if known is None or known.refused or not 0 < max(tensor_sizes(batch), default=0) <= most:
        return None
    try:
        return _terms(known, model, posteriors, class_logits, batch, by_group=by_group)
    except Exception as error:  # noqa: BLE001  (whatever copies raise: the example itself comes next)
        known.refused = True
        _logger.warning("examples are not copied, and take one backward pass for each contrast: %s", first_line(error))
        return None


def _known_of(model: nn.Module, class_logits: ClassLogits) -> _Known | None:
    """What is known of a model and a function, neither of which is kept alive; None for one without weak references."""
    functions = _known.setdefault(model, weakref.WeakKeyDictionary())
    owner = getattr(class_logits, "__self__", class_logits)
    try:
        return functions.setdefault(owner, {}).setdefault(getattr(class_logits, "__func__", None), _Known())
    except TypeError:  # it has no weak references, or no hash
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
    expected = None
    if known.num_classes is None:
        with torch.no_grad(), evaluation_mode(model):
            expected, _ = run_class_logits(class_logits, model, batch)
        if len(expected) != 1:
            raise _NoCopiesError(f"a batch with one row has {len(expected)} examples")
        known.num_classes = expected.shape[1]
    count = known.num_classes - 1
    if count < _FEWEST:
        return None
    layers = layers_of(model, posteriors)
    with tapped_batch(model, layers, class_logits, batch_rows(batch, [0] * count, 1)) as tapped, torch.no_grad():
        if len(tapped.logits) != count or tapped.taps.num_rows != count:
            raise _NoCopiesError(f"{count} copies have logits of shape {tuple(tapped.logits.shape)}")
        if tapped.logits.shape[1] != known.num_classes:  # the next example gets as many copies
            known.num_classes = tapped.logits.shape[1]
            return None
        slots = [tapped.taps.slots(position) for position in range(len(layers))]
        names = {layer.name for layer in layers}
        _check_rows(tapped, slots, thorough=not names <= known.checked)
        known.checked |= names
        places = _places(tapped, slots, count, expected)
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


def _places(tapped: TappedBatch, slots: Sequence[Slots], count: int, expected: Tensor | None) -> list[Tensor]:
    """Positions `[count, S]` of the slots of each copy, for each layer.

    Within a layer the slots of one row are in the order of its tokens, or in that of experts and then tokens.

    Args:
        tapped: The copies.
        slots: The slots of each layer.
        count: Number of copies.
        expected: Logits `[1, K]` of the example itself, if they are compared.

    Raises:
        _NoCopiesError: If the copies do not have the same logits and inputs of experts, up to rounding, and the same
            routes.
    """
    allowed = max(_ROUNDING.get(of.inputs.dtype, _EPS * torch.finfo(of.inputs.dtype).eps) for of in slots)
    values = tapped.logits.detach().double()
    least = values.amin()
    values = torch.where(tapped.present, values, least)
    reference = values[:1]
    same = [(tapped.present == tapped.present[:1]).all().view(1)]
    if expected is not None:
        reference = torch.where(present_classes(expected), expected.double().to(values.device), least)
    same.append(((values - reference).abs() <= allowed * (values.amax() - least)).all().view(1))
    places = []
    for of_layer in slots:
        if of_layer.rows is None or len(of_layer.rows) % count:
            raise _NoCopiesError("slots have no rows, or copies not equally many")
        at = of_layer.rows.argsort(stable=True).view(count, -1)
        copies = torch.arange(count, device=at.device).unsqueeze(1)
        experts, inputs = of_layer.experts[at], of_layer.inputs[at]
        alike = (inputs - inputs[:1]).abs() <= allowed * inputs.abs().amax()
        same.append(((of_layer.rows[at] == copies) & (experts == experts[:1]) & alike.all(2)).all().view(1))
        places.append(at)
    if not all(map(bool, to_cpu(same))):
        raise _NoCopiesError("copies have other logits or routes than the example")
    return places
