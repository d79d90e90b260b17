"""The side on which a model's rows may be padded, and whether choices may share a row, measured on the model itself.

Attention over single positions ignores padding on either side. Attention over blocks of neighbouring positions mixes
padding on the left into them, and experts of a limited capacity that are filled in the order of positions drop tokens
for padding on the left. Choices that share the row of their prompt need a model that passes on a mask of pairs of
tokens, and looks at no order of tokens but that of their positions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from bmoe_lightning.data.batches import Batch, Collate, EncodedQuestion, PaddingSide
from bmoe_lightning.data.cloze import ClozeCollate
from bmoe_lightning.utils.distributed import gather_number
from bmoe_lightning.utils.random_state import forked_random_state

_logger = logging.getLogger(__name__)

# Numbers of padded tokens of the rows; a multiple of a block's length may do no harm.
_PADS = (0, 1, 3, 2, 5, 7)
# Differences of the logits in units of their spread: up to the first they are rounding, above the second they are not.
# Between them, in half precision, the two sides are compared with each other.
_FULL_PRECISION = (1e-3, 1e-3)
_HALF_PRECISION = (0.02, 0.5)
_CLEARLY_LESS = 1 / 3
# Of the median question, whose choices share a row or do not. Rounding may send single tokens to other experts.
_SHARED = (1e-3, 0.1)
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
    questions = shortened(_of_equal_length(question), rows)
    logits_of = _Logits(module, class_logits)
    with _evaluated(module):
        found = [logits_of(collate([item])) for item in questions]
        negligible, wrong = _FULL_PRECISION if is_full_precision(module, {found[0].dtype}) else _HALF_PRECISION
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


def shares_prompts(
    module: nn.Module, class_logits: Callable[[Any], Any], question: EncodedQuestion, collate: ClozeCollate, rows: int
) -> bool:
    """Whether the logits of a module stay the same where the choices of a question share the row of its prompt.

    A collective, if there are several ranks: all of them get the same answer.

    Args:
        module: The module, on its device; as in `measured_padding_side`.
        class_logits: Function `batch -> (logits [B, K], labels)`.
        question: Question to measure with; a long one shows most.
        collate: Collates questions into batches, padded on the module's side.
        rows: Largest number of rows of a batch.
    """
    questions = shortened(question, rows)
    logits_of = _Logits(module, class_logits)
    with _evaluated(module):
        apart = logits_of(replace(collate, shared=False)(questions))
        try:
            together = logits_of(replace(collate, shared=True)(questions))
        except Exception as error:  # noqa: BLE001  (what takes rows of one choice only may fail in any way)
            _logger.info("each choice has its own row: the model cannot run them in one (%s)", error)
            error_of_median = math.inf
        else:
            error_of_median = float(row_errors(together, apart).median())
        full, half = _SHARED
        tolerance = full if is_full_precision(module, {apart.dtype}) else half
    return _largest(error_of_median) <= tolerance


class _Logits:
    """Logits `[B, K]` of a batch, on the CPU."""

    def __init__(self, module: nn.Module, class_logits: Callable[[Any], Any]) -> None:
        self._class_logits = class_logits
        self._device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))

    def __call__(self, batch: Batch) -> Tensor:
        on_device = {name: value.to(self._device) for name, value in batch.items() if isinstance(value, Tensor)}
        return self._class_logits(on_device)[0].detach().cpu()


def _of_equal_length(question: EncodedQuestion) -> EncodedQuestion:
    """A question whose choices are cut to the shortest, so that a batch of it alone has no padding."""
    shortest = min(map(len, question.choices), default=0)
    return replace(question, choices=tuple(choice[:shortest] for choice in question.choices))


def shortened(question: EncodedQuestion, rows: int) -> list[EncodedQuestion]:
    """A question and copies without some of its first tokens, which a batch of all of them pads."""
    ids = question.token_ids
    return [replace(question, token_ids=ids[pad:]) for pad in _PADS[:rows] if pad < len(ids)]


def padding_error(logits: Tensor, alone: Tensor) -> float:
    """The largest of `row_errors`, of the logits of a padded batch and those of each row alone."""
    return float(row_errors(logits, alone).max())


def row_errors(logits: Tensor, expected: Tensor, unit: Tensor | float = 1.0) -> Tensor:
    """The largest difference of each row's logits from the expected ones, up to a shift of the row.

    Only classes that both have are compared; a class is absent where its logit is `-inf` or the expected one is
    not finite, and where there is no column.

    Args:
        logits: Logits `[B, K]`.
        expected: Logits `[B, L]`.
        unit: Smallest unit of the result, of each row `[B]` or of all.

    Returns:
        `[B]`, the difference over the standard deviation of the row's logits in either, or over the unit where both are
        smaller; infinite where logits are NaN.
    """
    columns = min(logits.shape[1], expected.shape[1])
    logits, expected = logits[:, :columns].double(), expected[:, :columns].double()
    present = (logits != -torch.inf) & expected.isfinite()
    count = present.sum(1, keepdim=True).clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        values = torch.where(present, values, 0)
        return torch.where(present, values - values.sum(1, keepdim=True) / count, 0)

    spread = (
        torch.stack([centred(values).square().sum(1) / count[:, 0] for values in (logits, expected)]).amax(0).sqrt()
    )
    smallest = torch.as_tensor(unit, dtype=spread.dtype, device=spread.device)
    errors = (centred(logits) - centred(expected)).abs().amax(1) / spread.clamp(min=smallest.clamp(min=_RESOLUTION))
    return errors.nan_to_num(nan=math.inf, posinf=math.inf)


def _largest(error: float) -> float:
    """The largest error of all ranks. A collective."""
    limited = min(error, 1e6)
    return max(gather_number(round(limited / _RESOLUTION))) * _RESOLUTION


def is_full_precision(module: nn.Module, dtypes: Collection[torch.dtype]) -> bool:
    """Whether a module computes with the digits of float32, without autocast and TF32.

    Args:
        module: The module.
        dtypes: Floating-point types of its outputs.
    """
    all_dtypes = {parameter.dtype for parameter in module.parameters()}.union(dtypes)
    devices = {"cpu", *(parameter.device.type for parameter in module.parameters())} - {"meta"}
    try:
        reduced = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it was set for single backends
        reduced = True
    return (
        all_dtypes <= {torch.float32, torch.float64}
        and not reduced
        and not any(map(torch.is_autocast_enabled, devices))
    )


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
