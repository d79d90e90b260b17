"""Attention masks of pairs of tokens, in the form that a model takes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def pair_mask(model: PreTrainedModel, seen: Tensor) -> Tensor:
    """The attention mask by which a token sees some others, and itself: a softmax over nothing is NaN.

    Args:
        model: Model with eager or SDPA attention.
        seen: Whether the second token is seen by the first one, `[R, T, T]` bool.

    Returns:
        `[R, 1, T, T]`: bool for SDPA, numbers to add for eager attention.

    Raises:
        ValueError: If the model's attention takes no such mask.
    """
    places = torch.arange(seen.shape[-1], device=seen.device)
    seen = (seen | (places.unsqueeze(1) == places)).unsqueeze(1)
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation == "sdpa":
        return seen
    if implementation == "eager":
        return torch.zeros_like(seen, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    raise ValueError(
        f"the attention implementation {implementation!r} takes no mask of pairs of tokens, so texts or choices cannot "
        "share a row; give each its own row, or load the model with attn_implementation='sdpa'"
    )
