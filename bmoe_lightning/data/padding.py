"""The side on which a model's rows may be padded, measured on the model itself.

Attention over single positions ignores padding on either side. Attention over blocks of neighbouring positions mixes
padding on the left into them, and experts of a limited capacity that are filled in the order of positions drop tokens
for padding on the left.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from bmoe_lightning.data.batches import Batch, Collate, EncodedQuestion, PaddingSide
from bmoe_lightning.utils.distributed import gather_number
from bmoe_lightning.utils.random_state import forked_random_state

# Numbers of padded tokens of the rows; a multiple of a block's length may do no harm.
_PADS = (0, 1, 3, 2, 5, 7)
# Differences of the logits in units of their spread: up to the first they are rounding, above the second they are not.
# Between them, in half precision, the two sides are compared with each other.
_FULL_PRECISION = (1e-3, 1e-3)
_HALF_PRECISION = (0.02, 0.5)
_CLEARLY_LESS = 1 / 3
_RESOLUTION = 1e-9


def measured_padding_side(
    module: nn.Module, class_logits: Callable[[Any], Any], question: EncodedQuestion, collate: Collate, rows: int
) -> PaddingSide:
    """The side on which padding does not change the logits of a module: left, if both do not.

    A collective, if there are several ranks: all of them get the same side.

    Args:
        module: The module, on its device. It runs in evaluation mode without gradients; its modes and the random state
            are restored.
        class_logits: Function `batch -> (logits [B, K], labels)`.
        question: Question to measure with; a long one shows most.
        collate: Collates questions into batches.
        rows: Largest number of rows of a batch, at least 2.

    Raises:
        ValueError: If padding changes the logits on both sides.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))

    def logits_of(batch: Batch) -> Tensor:
        on_device = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        return class_logits(on_device)[0].detach().cpu()

    questions = shortened(question, rows)
    with _evaluated(module):
        found = [logits_of(collate([item])) for item in questions]
        negligible, wrong = _FULL_PRECISION if _is_full_precision(module, found[0]) else _HALF_PRECISION
        alone = torch.cat(found).double()
        left = _largest(padding_error(logits_of(replace(collate, side="left")(questions)).double(), alone))
        if left <= negligible:
            return "left"
        right = _largest(padding_error(logits_of(replace(collate, side="right")(questions)).double(), alone))
    if right <= wrong and (right <= negligible or right < _CLEARLY_LESS * left):
        return "right"
    if left <= wrong:
        return "left"
    raise ValueError(
        f"padding changes the logits of a prompt: by {left:.2g} of their spread on the left, by {right:.2g} on the "
        "right. Read the logits at each row's last position that is not padding, as bmoe_lightning.models.last_logits "
        "does, with attention_mask and position_ids; if they still change, the model mixes padding into a row, and "
        "batch_size=1 with eval_batch_size=1, which pads nothing, is right."
    )


def warn_of_padding(module: nn.Module, class_logits: Callable[[Any, Any], Any], batch: Any) -> None:
    """Warn if the most padded row of a batch has other logits than the same row alone.

    Batches that are no mutable mapping with an `attention_mask` `[B, T]`, that have no padding, or that have several
    rows for each example are not compared.

    Args:
        module: The module. It runs in evaluation mode without gradients; its modes and the random state are restored.
        class_logits: Function `(module, batch) -> (logits [B, K], labels)`.
        batch: Batch on the module's device.

    Warns:
        UserWarning: If the row's logits differ by more than rounding.
    """
    mask = batch.get("attention_mask") if isinstance(batch, MutableMapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.ne(0).all()):
        return
    row = int(mask.ne(0).sum(1).argmin())
    kept = mask[row].ne(0)

    def alone(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:1] != mask.shape[:1]:
            return value
        value = value[row : row + 1]
        return value[:, kept] if value.shape[1:2] == kept.shape else value

    with _evaluated(module):
        # Shallow copies of the batch's own class, from which `class_logits` may take entries.
        found = class_logits(module, copy.copy(batch))[0].detach()
        precise, padded = _is_full_precision(module, found), found.double()
        if len(padded) != len(mask):
            return
        single: Any = copy.copy(batch)
        single.update({name: alone(value) for name, value in batch.items()})
        expected = class_logits(module, single)[0].detach().double()
    error = padding_error(padded[row : row + 1], expected)
    if error > (_FULL_PRECISION if precise else _HALF_PRECISION)[1]:
        side = "left" if bool(kept[-1]) else "right"
        warnings.warn(
            f"padding changes the logits of row {row} of a batch, by {error:.2g} of their spread: the model does not "
            f"ignore padding on the {side}. Pad on the other side, as MultipleChoiceDataModule does where that is "
            "right, or make batches of rows of equal length.",
            UserWarning,
            stacklevel=2,
        )


def shortened(question: EncodedQuestion, rows: int) -> list[EncodedQuestion]:
    """A question and copies without some of its first tokens, which a batch of all of them pads."""
    ids = question.token_ids
    return [replace(question, token_ids=ids[pad:]) for pad in _PADS[:rows] if pad < len(ids)]


def padding_error(logits: Tensor, alone: Tensor) -> float:
    """The largest difference of logits from those of each row alone, up to a shift of the row.

    Args:
        logits: Logits `[B, K]` of a padded batch; `-inf` for absent classes.
        alone: Logits `[B, K]` of each row alone.

    Returns:
        The difference over the standard deviation of the row's logits, or over 1 where that is smaller; infinite if
        logits are NaN.
    """
    present = alone.isfinite()
    count = present.sum(1, keepdim=True).clamp(min=1)
    expected = torch.where(present, alone, 0)
    spread = (expected - expected.sum(1, keepdim=True) / count).where(present, 0).square().sum(1, keepdim=True) / count
    difference = torch.where(present, logits - alone, 0)
    difference = (difference - difference.sum(1, keepdim=True) / count).where(present, 0)
    error = float((difference.abs() / spread.sqrt().clamp(min=1)).max())
    return math.inf if math.isnan(error) else error


def _largest(error: float) -> float:
    """The largest error of all ranks. A collective."""
    limited = min(error, 1e6)
    return max(gather_number(round(limited / _RESOLUTION))) * _RESOLUTION


def _is_full_precision(module: nn.Module, logits: Tensor) -> bool:
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()} | {logits.dtype}
    devices = {"cpu", *(parameter.device.type for parameter in module.parameters())} - {"meta"}
    return not dtypes - {torch.float32, torch.float64} and not any(map(torch.is_autocast_enabled, devices))


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Run a module in evaluation mode without gradients; its modes and the random state are restored."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        # Compiled code would be compiled for these shapes too.
        with torch.no_grad(), forked_random_state(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for part, training in modes:
            part.training = training
            if isinstance(part, FSDPModule):
                part.reshard()  # an optimizer that is made after this must find the shards
