"""The next-token logits of a causal language model at a few positions."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def last_logits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits at the last position of each row that is not padding.

    The output embedding is applied to no other positions than these, where the model supports that.

    Args:
        model: A causal language model.
        input_ids: Token ids `[B, T]`, padded on either side.
        attention_mask: Mask `[B, T]`, zero for padding.

    Returns:
        `[B, V]`, in the model's dtype.

    Raises:
        ValueError: If the model returns logits at other positions than asked for.
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask.ne(0) * positions).argmax(dim=1)
    kept, column = last.unique(return_inverse=True)
    logits = logits_at(
        model, input_ids, attention_mask, kept, position_ids=(attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    )
    return logits[torch.arange(len(last), device=last.device), column]


def logits_at(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, *, position_ids: Tensor
) -> Tensor:
    """Logits at some positions of all rows, to which alone the output embedding is applied where the model permits.

    Args:
        model: A causal language model.
        input_ids: Token ids `[B, T]`.
        attention_mask: Mask `[B, T]`, zero for padding, or one that the model passes on to its attention,
            `[B, 1, T, T]`.
        positions: The positions `[P]`, without repetition.
        position_ids: Position of each token in its sequence, `[B, T]`.

    Returns:
        `[B, P, V]`, in the model's dtype.

    Raises:
        ValueError: If the model returns logits at other positions than asked for, or positions of tokens matter and it
            takes none.
    """
    accepted = inspect.signature(model.forward).parameters
    selects = _takes_positions(accepted.get("logits_to_keep"))
    if attention_mask.dim() == 4 and "position_ids" not in accepted:
        raise ValueError(f"{type(model).__name__} takes no position_ids, so tokens that share a row cannot be placed")
    options = {
        "position_ids": position_ids,
        "use_cache": False,
        # Frozen routers need no load-balancing loss.
        "output_router_logits": False,
        # For a number of positions the output embedding gets a slice that is not contiguous, for which torch runs one
        # product for each row and copies a frozen weight for each: B times the whole vocabulary.
        "logits_to_keep": positions if selects else 0,
    }
    options = {name: value for name, value in options.items() if name in accepted}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **options).logits
    expected = len(positions) if selects else input_ids.shape[1]
    if logits.shape[1] != expected:
        raise ValueError(
            f"{type(model).__name__} returned logits at {logits.shape[1]} positions instead of {expected}; a forward "
            "with `logits_to_keep: int | Tensor` must return those at the given positions, and every other forward all"
        )
    return logits if selects else logits[:, positions]


def _takes_positions(parameter: inspect.Parameter | None) -> bool:
    """Whether a parameter, by its annotation, takes a tensor of positions and not only their number."""
    annotation: Any = inspect.Parameter.empty if parameter is None else parameter.annotation
    return "Tensor" in str(annotation)
