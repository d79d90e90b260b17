"""The classes that each example has, without gaps, so that noise depends on them alone.

A batch has as many columns as its example with the most classes; for the others these are absent classes. If noise were
drawn for columns, an example would be predicted differently beside others.
"""

from __future__ import annotations

import torch
from torch import Tensor


def present_first(logits: Tensor) -> Tensor:
    """Indices `[B, C]` of the classes of each example, those it has first and in order.

    Args:
        logits: Logits `[B, K]`, `-inf` for absent classes.

    Returns:
        int64; C is the largest number of classes that an example has, K for no examples.
    """
    absent = logits == -torch.inf
    count = int((~absent).sum(1).max()) if len(logits) else logits.shape[1]
    return absent.to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def of_classes(values: Tensor, classes: Tensor) -> Tensor:
    """The values `[B, K, ...]` of some classes `[B, C]` of each example: `[B, C, ...]`."""
    index = classes.view(*classes.shape, *(1,) * (values.dim() - 2))
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))
