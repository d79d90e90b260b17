"""The check of `class_logits` on one batch, before anything is computed with it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.logits_contract import ClassLogits, checked_labels, looks_masked, run_class_logits
from bmoe_lightning.experts.model_state import evaluation_mode
from bmoe_lightning.experts.ownership import slot_owners
from bmoe_lightning.experts.tapped_batches import tapped_batch
from bmoe_lightning.experts.taps import check_graph
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.utils.random_state import unchanged_global_random_states


def check_class_logits(
    model: nn.Module,
    class_logits: ClassLogits,
    batch: Any,
    *,
    layers: Sequence[ExpertLayer] = (),
    labelled: bool = True,
    needing_labels: Sequence[str] = (),
) -> Tensor:
    """Check what `class_logits` returns for one batch, in one forward pass.

    With layers, whether logits depend on the tokens of other examples is checked at the last of them; that takes
    backward passes, in most models only as far as that layer.

    The model's modes, gradients and statistics and the random states are unchanged.

    Args:
        model: The model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: Batch that `class_logits` accepts.
        layers: Layers whose gradients will be taken; without any the forward pass stores no activations.
        labelled: Whether labels, if there are any, must be valid; otherwise they may be placeholders.
        needing_labels: Names of what needs labels.

    Returns:
        Logits `[B, K]` without graph.

    Raises:
        TypeError: If it does not return a pair.
        ValueError: If logits or labels are invalid or missing.
        RuntimeError: If the logits carry no graph, no expert layer was run, the logits of several examples depend on
            one token, the batch was written to, or the model is left in training mode.

    Warns:
        UserWarning: If a finite value looks like a mask, but is read as a logit.
    """
    class_logits = _keeping_evaluation_mode(class_logits)
    with unchanged_global_random_states():
        if layers:
            with tapped_batch(model, layers, class_logits, batch) as tapped:
                check_graph(tapped.logits)
                slots = [tapped.taps.slots(position) for position in range(len(layers))]  # raises if no layer was run
                if any(len(layer_slots.inputs) for layer_slots in slots):
                    slot_owners(tapped, slots)  # raises if a token affects several examples
                logits = tapped.logits.detach().masked_fill(~tapped.present, -torch.inf)
                labels = tapped.labels
        else:
            with torch.no_grad(), evaluation_mode(model):
                logits, labels = run_class_logits(class_logits, model, batch)
    _check_labels(labels, logits, labelled, needing_labels)
    mask = looks_masked(logits)
    if mask is not None:
        warnings.warn(
            f"class_logits returned the same value {mask:g} in several rows, far below all other logits, which is read "
            "as a logit; if it marks absent classes, use -inf",
            stacklevel=2,
        )
    return logits


def _keeping_evaluation_mode(class_logits: ClassLogits) -> ClassLogits:
    def run(model: Any, batch: Any) -> Any:
        evaluated = [(name, module) for name, module in model.named_modules() if not module.training]
        found = class_logits(model, batch)
        changed = [name or type(module).__name__ for name, module in evaluated if module.training]
        if changed:
            raise RuntimeError(
                f"class_logits leaves {changed[0]} in training mode, so later predictions would use "
                "dropout and batch statistics; do not call train() in it, since the callback sets and restores modes"
            )
        return found

    return run


def _check_labels(labels: Any, logits: Tensor, labelled: bool, needing_labels: Sequence[str]) -> None:
    if labels is not None:
        checked_labels(labels, logits, values=labelled or bool(needing_labels))
    elif needing_labels:
        raise ValueError(
            f"{', '.join(needing_labels)} need labels, but class_logits returned None for them; return (logits, labels)"
        )
