"""The check on one batch that the logits of an example depend on this example alone.

Not on chance and not on other examples: half of the batch is run again. Not on padding: the most padded row is run
alone without its padding. Where that differs, the batch and single rows are run to tell why. Other kernels and other
sizes of a batch round differently, and a token whose router is nearly undecided may then go to other experts. Rounding
is about as large in every row and such a token is rare, so several rows are compared before anything is refused.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, MutableMapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bmoe_lightning.data.padding import is_full_precision, row_errors
from bmoe_lightning.experts.batch_copies import batch_rows
from bmoe_lightning.experts.fsdp import reshard, runs_in_lockstep
from bmoe_lightning.experts.logits_contract import ClassLogits, masked_logits, run_class_logits
from bmoe_lightning.experts.model_state import evaluation_mode
from bmoe_lightning.experts.threads import in_this_thread
from bmoe_lightning.experts.wrappers.compiled import eager_code
from bmoe_lightning.experts.wrappers.quantised import has_quantised_linear
from bmoe_lightning.utils.distributed import gather_number
from bmoe_lightning.utils.random_state import unchanged_global_random_states

# Rows that are run alone where the first one differs.
_ROWS = 4
# Seed of the repeated calls, which must not draw what the first call drew.
_SEED = 0x5EED
_RESOLUTION = 1e-9
_LARGEST = 1e6


@dataclass(frozen=True)
class _Tolerance:
    """Differences of logits in units of their spread (see `row_errors`).

    Attributes:
        rounding: Of one row; anything smaller is rounding.
        refused: Of the median row; anything larger is no rounding.
        told: Of the median row; anything larger may be no rounding.
        told_of_one: Of any row; anything larger is no rounding, but the row's tokens may have gone to other experts.
    """

    rounding: float
    refused: float
    told: float
    told_of_one: float


# Measured over random models of all families, a row alone against the row in a batch of 8: at most 3e-5 in float32; in
# bfloat16 at most .06, and 0 in the median row. With the kernels of the taps, over 24 layers in bfloat16: .5 and .2.
_FULL_PRECISION = _Tolerance(rounding=1e-3, refused=1e-3, told=1e-3, told_of_one=0.02)
_HALF_PRECISION = _Tolerance(rounding=0.02, refused=0.5, told=0.1, told_of_one=0.5)


def check_examples(
    model: nn.Module, class_logits: ClassLogits, batch: Any, logits: Tensor, *, repeats: bool = True
) -> None:
    """Check that the logits of each example of a batch depend on this example alone.

    Without gradients, half of the batch is run once more, and a padded row; more where they differ. Rows are not
    compared where the batch has no row for each example, or where `class_logits` does not take a part of it.
    Padding is looked for in mutable mappings with an `attention_mask` `[B, T]`, or `[B, M, T]` with M rows for each
    example, on models whose weights are not sharded.

    Modes and random states are unchanged. A collective, if the weights are sharded: all ranks run the model equally
    often.

    Args:
        model: The model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: Batch on the model's device.
        logits: Logits `[B, K]` that `class_logits` returned for it before.
        repeats: Whether half of the batch is run; otherwise padding alone is looked for.

    Raises:
        ValueError: If the logits differ when they are computed again, or from those of rows alone.

    Warns:
        UserWarning: If they differ, but perhaps by rounding, or if padding changes the logits of a row.
    """
    with _evaluated(model), _output_dtypes(model) as dtypes:
        check = _ExampleCheck(model, class_logits, batch, len(logits), dtypes)
        first = masked_logits(logits)
        if (not repeats or check.is_half_alike(first)) and check.is_unpadded_row_alike(first):
            return
        alone = check.alone(check.repeated(first))
        if alone is not None and not runs_in_lockstep(model):
            # Ranks may differ in whether their batch is padded.
            check.unpadded(alone)


class _ExampleCheck:
    def __init__(
        self, model: nn.Module, class_logits: ClassLogits, batch: Any, size: int, dtypes: Set[torch.dtype]
    ) -> None:
        self._model, self._class_logits, self._batch, self._size = model, class_logits, batch, size
        self._dtypes = dtypes
        self._lockstep = runs_in_lockstep(model)
        self._has_quantised = has_quantised_linear(model)
        mask = batch.get("attention_mask") if isinstance(batch, MutableMapping) else None
        self._mask = None
        if isinstance(mask, Tensor) and len(mask) == size > 0 and (mask.dim() == 2 or _has_rows(batch, mask)):
            self._mask = mask.ne(0)
        self._whole: Tensor | None = None
        self._row = 0 if self._mask is None else int(self._positions(self._mask).sum(1).argmin())

    def is_half_alike(self, first: Tensor) -> bool:
        """Whether half of the batch has the same logits again."""
        errors = self._first_half(first)
        return errors is not None and self._largest(errors) <= self._tolerance.rounding

    def is_unpadded_row_alike(self, first: Tensor) -> bool:
        """Whether the most padded row has the same logits alone and without its padding, if that is looked for."""
        if self._lockstep or not self._is_padded():
            return True
        found = self._unpadded_row()
        return found is not None and self._largest(self._errors(found, first[[self._row]])) <= self._tolerance.rounding

    def repeated(self, first: Tensor) -> Tensor:
        """Run the batch again; its logits `[B, K]` float64."""
        again = self._logits(self._batch) if self._whole is None else self._whole
        if self._largest(self._errors(again, first)) <= self._tolerance.rounding:
            return again
        # The first call may have run other kernels, those of the taps; the next one runs the same.
        errors = self._errors(self._logits(self._batch), again)
        median, largest = self._median(errors), self._largest(errors)
        # Accelerators may add numbers in any order.
        is_exact = {parameter.device.type for parameter in self._model.parameters()} <= {"cpu"}
        if median > self._tolerance.refused or (is_exact and largest > self._tolerance.rounding):
            raise ValueError(
                "class_logits returned other logits when it was called again with the same batch in evaluation mode, "
                f"by {largest:.2g} of their spread, so results would change from call to call; draw no random numbers "
                "in it, and give torch.nn.functional.dropout the argument training=self.training"
            )
        if median > self._tolerance.told or largest > self._tolerance.told_of_one:
            _warn(
                "class_logits returned other logits when it was called again with the same batch in evaluation mode, "
                f"by {largest:.2g} of their spread; if that is no rounding, draw no random numbers in it"
            )
        return again

    def alone(self, whole: Tensor) -> Tensor | None:
        """Run the most padded row alone, and others where it differs.

        Returns:
            Its logits `[1, K]`; None where they differ or where rows cannot be run alone.
        """
        fewest = self._smallest(self._size)
        if fewest < 2:
            return whole if self._size == 1 else None
        if self._whole is not None:
            return None
        alone = self._part([self._row])
        if alone is None:
            # Code that takes several rows only, as batch statistics are defined for.
            errors = self._first_half(whole) if fewest > 2 else None
            if errors is None:
                return None
        else:
            first = self._largest(self._errors(alone, whole[[self._row]]))
            if first <= self._tolerance.rounding:
                return alone
            errors = torch.tensor([first, *self._further(whole, min(_ROWS, fewest))])
        median, largest = self._median(errors), self._largest(errors)
        if median <= self._tolerance.told and largest <= self._tolerance.told_of_one:
            return alone
        # A tensor with as many entries as the batch by chance may be cut to one, which is broadcast, but not to a few.
        if fewest > 2 and self._part([row for row in range(self._size) if row != self._row]) is None:
            return None
        said = (
            "class_logits returned other logits for the same example in a smaller batch, by "
            f"{largest:.2g} of their spread, so predictions would depend on the other examples of a batch; "
        )
        remedy = "compute the logits of each example from its own rows (no mean, norm or attention over the batch)"
        if median > self._tolerance.refused:
            raise ValueError(f"{said}{remedy}, or make batches of one example")
        _warn(f"{said}if that is no rounding, {remedy}")
        return None

    def _further(self, whole: Tensor, count: int) -> list[float]:
        """Errors of other rows alone; infinite where one cannot be run."""
        errors = []
        for place in range(1, count):
            row = (self._row + place * self._size // count) % self._size
            logits = self._part([row])
            errors.append(_LARGEST if logits is None else self._largest(self._errors(logits, whole[[row]])))
        return errors

    def _first_half(self, whole: Tensor) -> Tensor | None:
        rows = list(range((self._size + 1) // 2))
        logits = self._part(rows)
        return None if logits is None else self._errors(logits, whole[rows])

    def unpadded(self, alone: Tensor) -> None:
        """Run the most padded row without its padding, and warn if that changes its logits."""
        found = self._unpadded_row() if self._is_padded() else None
        if found is None or len(alone) != 1:
            return
        assert self._mask is not None
        error = self._largest(row_errors(alone, found))
        if error > self._tolerance.refused:
            side = "left" if bool(self._positions(self._mask)[self._row, -1]) else "right"
            _warn(
                f"padding changes the logits of row {self._row} of a batch, by {error:.2g} of their spread: the model "
                f"does not ignore padding on the {side}. Pad on the other side, as MultipleChoiceDataModule does where "
                "that is right, or make batches of rows of equal length."
            )

    def _is_padded(self) -> bool:
        return self._mask is not None and not bool(self._positions(self._mask)[self._row].all())

    @staticmethod
    def _positions(mask: Tensor) -> Tensor:
        """The positions `[B, T]` at which any row of an example has a token."""
        return mask.flatten(1, -2).any(1) if mask.dim() > 2 else mask

    def _unpadded_row(self) -> Tensor | None:
        """Logits `[1, K]` of the most padded row without its padding; None if the batch has no such row."""
        assert self._mask is not None
        kept, shape = self._positions(self._mask)[self._row], self._mask.shape[1:]

        def cut(value: Any) -> Any:
            is_padded = isinstance(value, Tensor) and value.shape[: 1 + len(shape)] == (1, *shape)
            return value[(slice(None),) * len(shape) + (kept,)] if is_padded else value

        single = self._rows([self._row])
        if single is None:
            return None
        single.update({name: cut(value) for name, value in single.items()})
        found = self._tried(single)
        return found if found is not None and len(found) == 1 else None

    @property
    def _coarse(self) -> bool:
        return self._has_quantised or not is_full_precision(self._model, self._dtypes)

    @property
    def _tolerance(self) -> _Tolerance:
        return _HALF_PRECISION if self._coarse else _FULL_PRECISION

    def _logits(self, batch: Any) -> Tensor:
        return masked_logits(run_class_logits(self._class_logits, self._model, batch)[0])

    def _errors(self, logits: Tensor, expected: Tensor) -> Tensor:
        """Errors `[B]`; those of logits that are rounded to a few digits are at least in units of these digits."""
        if logits.shape[0] != expected.shape[0]:
            return torch.tensor([_LARGEST])
        if not self._coarse:
            return row_errors(logits, expected)
        largest = torch.stack([values.nan_to_num(neginf=0).abs().amax(1) for values in (logits, expected)]).amax(0)
        return row_errors(logits, expected, 16 * torch.finfo(torch.bfloat16).eps * largest)

    def _tried(self, batch: Any) -> Tensor | None:
        try:
            return self._logits(batch)
        except Exception:  # noqa: BLE001  (code that takes whole batches only may fail in any way)
            return None

    def _rows(self, rows: Sequence[int]) -> Any:
        """Some rows of the batch; None if it has no such rows."""
        try:
            return batch_rows(self._batch, rows, self._size)
        except Exception:  # noqa: BLE001  (a tensor of another layout)
            return None

    def _part(self, rows: Sequence[int]) -> Tensor | None:
        """Logits of some rows of the batch; None if the batch has no such rows, on any rank."""
        part = self._rows(rows)
        if not self._smallest(int(part is not None)):
            return None
        found = self._tried(part)
        is_part = found is not None and len(found) == len(rows)
        if not is_part and found is not None and len(found) == self._size and not self._lockstep:
            self._whole = found  # a batch without a row for each example, of which nothing was cut that matters
        return found if self._smallest(int(is_part)) else None

    def _largest(self, errors: Tensor) -> float:
        return self._agreed(float(errors.max()) if len(errors) else 0.0)

    def _median(self, errors: Tensor) -> float:
        return self._agreed(float(errors.median()) if len(errors) else 0.0)

    def _agreed(self, error: float) -> float:
        """The largest error of all ranks that run in lockstep, so that they go on alike."""
        error = min(error, _LARGEST)
        return max(gather_number(round(error / _RESOLUTION))) * _RESOLUTION if self._lockstep else error

    def _smallest(self, number: int) -> int:
        return min(gather_number(number)) if self._lockstep else number


def _has_rows(batch: Any, mask: Tensor) -> bool:
    """Whether a mask `[B, M, T]` is one of M rows for each example, and not of pairs of tokens."""
    ids = batch.get("input_ids")
    return mask.dim() == 3 and isinstance(ids, Tensor) and ids.shape == mask.shape


def _warn(sentence: str) -> None:
    warnings.warn(sentence, UserWarning, stacklevel=2)


@contextmanager
def _output_dtypes(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """The floating-point types of the outputs of modules that run within: of float32 weights others, with autocast."""
    seen: set[torch.dtype] = set()

    def see(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            seen.add(output.dtype)

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(in_this_thread(see)).remove)
        yield seen


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Run a model without gradients in evaluation mode; modes and random states are restored."""
    with ExitStack() as stack:
        stack.enter_context(unchanged_global_random_states())
        random.seed(_SEED)
        np.random.seed(_SEED)
        torch.default_generator.manual_seed(_SEED)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(_SEED)
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(model))
        stack.callback(reshard, model)
        # Compiled code would be compiled for these shapes too.
        stack.enter_context(eager_code())
        yield
