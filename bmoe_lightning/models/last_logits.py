"""The next-token logits of a causal language model after a prompt."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel


def last_logits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits at the last position of each row that is not padding.

    Args:
        model: A causal language model.
        input_ids: Token ids `[B, T]`, padded on either side.
        attention_mask: Mask `[B, T]`, zero for padding.

    Returns:
        `[B, V]`, in the model's dtype.
    """
    ends_in_text = bool(attention_mask[:, -1].all())
    options = {
        "position_ids": (attention_mask.long().cumsum(-1) - 1).clamp(min=0),
        "use_cache": False,
        # Frozen routers need no load-balancing loss.
        "output_router_logits": False,
        # Over a large vocabulary, logits at all positions would be expensive.
        "logits_to_keep": 1 if ends_in_text else 0,
    }
    accepted = inspect.signature(model.forward).parameters
    options = {name: value for name, value in options.items() if name in accepted}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **options).logits
    if ends_in_text:
        return logits[:, -1]
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask.ne(0) * positions).argmax(dim=1)
    return logits[torch.arange(len(last), device=last.device), last]
