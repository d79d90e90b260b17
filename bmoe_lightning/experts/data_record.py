"""A record of a data set as the model sees it, by which a later fit tells whether it gets the same data.

Batches may be anything, and the same example is padded differently in another batch. So a data set is known by what
`class_logits` returns: labels, which are exact, and logits, which differ between examples by much more than by batch
size, padding, device or dtype. The logits and labels of the first examples are kept, and for all examples their number,
the number of each label, and sums of projected logits for each label: a few kilobytes whatever the size of the data.
The sums do not depend on the order of the examples, and those of several ranks add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bmoe_lightning.experts.logits_contract import NO_LABEL
from bmoe_lightning.experts.row_matching import paired
from bmoe_lightning.utils.distributed import gather_number, num_processes, process_rank, sum_over_processes

FIRST = 64
"""Number of examples whose logits are kept."""

_PROJECTIONS = 8
# In units of the spread between examples. Measured on small random models of 1 to 4 layers in float64, against the same
# model in bfloat16 and against other inputs (tests/experts/test_data_record.py): an example moves by .01 (median) where
# weights and activations are rounded, by up to 2 where another of two equally good experts is chosen, which happens to
# 1 % of the examples; in float32 by 2e-7; other inputs are 1.9 away (median), and 4 % of them nearer than .5. Trained
# models round more, by .02 to .05, so that every limit is several times what was measured.
_ALIGNED = 0.1
_SAME_EXAMPLE = 0.5
_EXACT = 1e-4
_REROUTED = 0.03  # of the examples
# The mean of n examples differs between two data sets by about 1.4 of the spread over sqrt(n).
_SAME_MEANS = 0.25
_SYSTEMATIC = 0.02
_ROUNDING = 2.0**-9  # of bfloat16


@dataclass(frozen=True)
class DataRecord:
    """What is known of a data set.

    Attributes:
        counts: Number of examples without a label and with each label, `[1 + K]` int64.
        sums: Sums of the projections of their centred logits, `[1 + K, 8]` float64.
        squares: Sums of squared projections over all examples, `[8]` float64.
        logits: Logits of the first examples, `[F, K]` float64, `-inf` for absent classes and NaN for unknown examples.
        labels: Their labels, `[F]` int64, or `NO_LABEL`.
        limits: Number of ranks, and maximum number of batches of each or -1, `[2]` int64.
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor
    logits: Tensor
    labels: Tensor
    limits: Tensor

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return int(self.counts.sum())

    @property
    def max_batches(self) -> int | None:
        """Maximum number of batches of each rank, if only a part of the data was seen."""
        limit = int(self.limits[1])
        return None if limit < 0 else limit

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> DataRecord:
        """The record of `tensors`.

        Raises:
            ValueError: If they are not those of a record.
        """
        names = [entry.name for entry in fields(cls)]
        if missing := [name for name in names if name not in tensors]:
            raise ValueError(f"a record of data lacks {missing}")
        record = cls(**{name: tensors[name] for name in names})
        groups, classes = len(record.counts), record.logits.shape[-1]
        shapes = {
            "counts": (torch.int64, (groups,)),
            "sums": (torch.float64, (groups, _PROJECTIONS)),
            "squares": (torch.float64, (_PROJECTIONS,)),
            "logits": (torch.float64, (FIRST, classes)),
            "labels": (torch.int64, (FIRST,)),
            "limits": (torch.int64, (2,)),
        }
        for name, (dtype, shape) in shapes.items():
            found = tensors[name]
            if found.dtype != dtype or found.shape != shape:
                raise ValueError(f"{name!r} of a record of data has dtype {found.dtype} and shape {tuple(found.shape)}")
        if not bool((record.counts >= 0).all() & record.sums.isfinite().all() & (record.squares >= 0).all()):
            raise ValueError("a record of data has impossible values")
        return record

    def beginning(self, other: DataRecord) -> str | None:
        """How the first examples of another data set differ; empty if they are the same, None in another order."""
        return compared((self.logits, self.labels), (other.logits, other.labels))

    def difference(self, other: DataRecord) -> str:
        """How another data set differs, whatever its order; empty if it is the same.

        Args:
            other: Record of the other data set.

        Returns:
            A phrase such as `80 examples instead of 96`.
        """
        if self.num_examples != other.num_examples:
            return f"{other.num_examples} examples instead of {self.num_examples}"
        size = max(len(self.counts), len(other.counts))
        counts, found = (pad(record.counts, (0, size - len(record.counts))) for record in (self, other))
        sums, found_sums = (pad(record.sums, (0, 0, 0, size - len(record.sums))) for record in (self, other))
        if counts[0] == counts.sum() or found[0] == found.sum():
            # One of them has no labels.
            counts, sums, found_sums = counts.sum(0, True), sums.sum(0, True), found_sums.sum(0, True)
        elif not torch.equal(counts, found):
            return _other_counts(counts, found)
        if beginning := self.beginning(other):
            return beginning
        total = max(1, self.num_examples)
        spread = (self.squares / total - (self.sums.sum(0) / total).square()).clamp(min=0).sqrt()
        rounding = _ROUNDING * (self.squares / total).sqrt()
        used = counts > 0
        numbers = counts[used].double().unsqueeze(1)
        apart = (found_sums - sums)[used].abs() / numbers
        relative = (apart - rounding).clamp(min=0) / spread.clamp(min=torch.finfo(torch.float64).tiny)
        if not relative.numel() or float(relative.max()) <= _SYSTEMATIC:
            return ""
        is_same = float((relative * numbers.sqrt()).square().mean().sqrt()) <= _SAME_MEANS
        return "" if is_same else "other inputs (the model's logits differ)"


class DataRecorder:
    """Records a data set during a pass over it.

    Args:
        distributed: Whether this is the shard of one of all ranks of torch.distributed's default group.
        max_batches: Maximum number of batches of the pass on each rank; None for all of them.
    """

    # Inference tensors could not be written to outside of inference mode.
    @torch.inference_mode(False)
    def __init__(self, *, distributed: bool = False, max_batches: int | None = None) -> None:
        self._distributed = distributed
        self._rank, self._ranks = (process_rank(), num_processes()) if distributed else (0, 1)
        self._limits = torch.tensor([self._ranks, -1 if max_batches is None else max_batches])
        self._counts = torch.zeros(1, dtype=torch.int64)
        self._sums = torch.zeros(1, _PROJECTIONS, dtype=torch.float64)
        self._squares = torch.zeros(_PROJECTIONS, dtype=torch.float64)
        self._logits = torch.full((FIRST, 0), torch.nan, dtype=torch.float64)
        self._labels = torch.full((FIRST,), NO_LABEL)
        self._known = torch.zeros(FIRST, dtype=torch.bool)
        self._matrix = torch.empty(0, _PROJECTIONS, dtype=torch.float64)
        self._seen = 0
        self._is_complete = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, logits: Tensor, labels: Any, num_counted: int) -> None:
        """Add a batch, on the device of its logits, without waiting for it.

        Args:
            logits: Logits `[B, K]`, `-inf` for absent classes.
            labels: Labels as `class_logits` returned them; anything but integers `[B]` counts as none.
            num_counted: Number of examples, from the first, that are counted.
        """
        values = logits.detach()[:num_counted].double()
        size, num_classes = values.shape
        self._move(values.device)
        self._widen(num_classes)
        groups = integer_labels(labels, len(logits))[:num_counted].to(values.device)
        begin = self._rank + self._ranks * self._seen
        places = slice(begin, FIRST, self._ranks)  # those of the first examples that are left to this rank
        first = min(size, len(range(FIRST)[places]))
        if first:
            places = slice(begin, begin + self._ranks * (first - 1) + 1, self._ranks)
            self._logits[places, :num_classes] = values[:first]
            self._labels[places], self._known[places] = groups[:first], True
        self._seen += size
        groups = torch.where((groups >= 0) & (groups < num_classes), groups + 1, 0)
        projections = _centred(values) @ self._matrix[:num_classes]
        self._counts.index_add_(0, groups, torch.ones_like(groups))
        self._sums.index_add_(0, groups, projections)
        self._squares += projections.square().sum(0)

    def state(self) -> dict[str, Tensor]:
        """All tensors needed to resume, by name; none if the record misses batches."""
        if not self._is_complete:
            return {}
        return {
            "counts": self._counts,
            "sums": self._sums,
            "squares": self._squares,
            "logits": self._logits,
            "labels": self._labels,
        }

    @torch.inference_mode(False)
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state`; raises `ValueError` if it does not fit.

        Without one, as of a pass of an earlier version, the record stays incomplete.
        """
        if not state:
            self._is_complete = False
            return
        if state.keys() != self.state().keys():
            raise ValueError(f"the record of the data has {sorted(state)}")
        DataRecord.from_tensors({**state, "limits": self._limits})
        self._counts, self._sums, self._squares, self._logits, self._labels = (
            state[name].clone() for name in self.state()
        )
        self._known = ~self._logits.isnan().any(1) & bool(self._logits.shape[1])
        self._seen, self._matrix = int(self._counts.sum()), _matrix(self._logits.shape[1])

    def finish(self) -> DataRecord | None:
        """The record of all ranks' data, on the CPU; None if it misses batches. A collective, if distributed."""
        self._move(torch.device("cpu"))
        if not self._distributed:
            return self._record(self._logits) if self._is_complete else None
        if min(gather_number(int(self._is_complete))) == 0:
            return None
        self._widen(max(gather_number(self._logits.shape[1])))
        known = self._known.unsqueeze(1)
        # Sums of zeros and one rank's values, which may be neither -inf nor NaN.
        absent = (known & (self._logits == -torch.inf)).long()
        logits = torch.where(known & self._logits.isfinite(), self._logits, 0)
        labels, count = torch.where(self._known, self._labels, 0), self._known.long()
        sum_over_processes([self._counts, self._sums, self._squares, logits, labels, absent, count])
        logits = logits.masked_fill(absent.bool(), -torch.inf).masked_fill((count == 0).unsqueeze(1), torch.nan)
        self._labels = labels.masked_fill(count == 0, NO_LABEL)
        return self._record(logits)

    def _record(self, logits: Tensor) -> DataRecord:
        return DataRecord(self._counts, self._sums, self._squares, logits, self._labels, self._limits)

    def _move(self, device: torch.device) -> None:
        """Move the sums to a device."""
        if self._counts.device != device:
            for name in ("_counts", "_sums", "_squares", "_logits", "_labels", "_known", "_matrix"):
                setattr(self, name, getattr(self, name).to(device))

    def _widen(self, num_classes: int) -> None:
        """Make room for more classes, which are absent in the earlier batches."""
        more = num_classes - self._logits.shape[1]
        if more > 0:
            self._counts = pad(self._counts, (0, more))
            self._sums = pad(self._sums, (0, 0, 0, more))
            self._matrix = _matrix(num_classes).to(self._counts.device)
            wider = pad(self._logits, (0, more), value=-torch.inf)
            self._logits = wider.masked_fill(~self._known.unsqueeze(1), torch.nan)


def record_of(logits: Tensor, labels: Tensor | None) -> DataRecord:
    """The record of a data set.

    Args:
        logits: Logits `[N, K]`, `-inf` for absent classes.
        labels: Labels `[N]`, or None.
    """
    recorder = DataRecorder()
    recorder.add(logits, labels, len(logits))
    record = recorder.finish()
    assert record is not None
    return record


def compared(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> str | None:
    """How examples differ from others in the same order; empty if they are the same, None in another order.

    Args:
        one: Logits `[N, K]` and labels `[N]`; NaN and `NO_LABEL` where they are unknown.
        other: Logits and labels of as many examples.
    """
    width = max(one[0].shape[1], other[0].shape[1])
    expected, found = (pad(x, (0, width - x.shape[1]), value=-torch.inf) for x, _ in (one, other))
    known = ~(expected.isnan() | found.isnan()).any(1)
    if not bool(known.any()):
        return None
    expected, found = expected[known], found[known]
    labels, other_labels = one[1][known], other[1][known]
    spread, rounding = _scales(expected)
    apart = (_centred(expected) - _centred(found)).abs().amax(1)
    apart = apart.masked_fill(((expected == -torch.inf) != (found == -torch.inf)).any(1), torch.inf)
    if float(apart.median()) > _ALIGNED * spread + rounding:
        return None
    relabelled = (labels != other_labels) & (labels != NO_LABEL) & (other_labels != NO_LABEL)
    if bool(relabelled.any()):
        return f"other labels (of {int(relabelled.sum())} of {len(labels)} examples)"
    replaced = apart > _SAME_EXAMPLE * spread + rounding
    is_rounded = float(apart.median()) > _EXACT * spread
    if int(replaced.sum()) > _REROUTED * len(labels) * is_rounded:
        return f"other inputs (the model's logits differ for {int(replaced.sum())} of {len(labels)} examples)"
    return ""


def compared_in_any_order(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> str | None:
    """How examples differ from others in any order; empty if they are the same, None if they are too many to tell.

    Args:
        one: Logits `[N, K]` and labels `[N]`; `NO_LABEL` where they are unknown.
        other: Logits and labels of any number of examples.
    """
    if len(one[0]) != len(other[0]):
        return f"{len(other[0])} examples instead of {len(one[0])}"
    width = max(one[0].shape[1], other[0].shape[1])
    expected, found = (pad(x, (0, width - x.shape[1]), value=-torch.inf) for x, _ in (one, other))
    groups, other_groups = (torch.where((y >= 0) & (y < width), y + 1, 0) for _, y in (one, other))
    counts, other_counts = (torch.bincount(y, minlength=1 + width) for y in (groups, other_groups))
    if len(groups) in (counts[0], other_counts[0]):
        groups, other_groups = torch.zeros_like(groups), torch.zeros_like(groups)
    elif not torch.equal(counts, other_counts):
        return _other_counts(counts, other_counts)
    spread, rounding = _scales(expected)
    # An example without a class is no neighbour of one that has it.
    far = 4 * (1 + torch.cat([_centred(expected), _centred(found)]).abs().amax())
    expected, found = (torch.where(x > -torch.inf, _centred(x), -far) for x in (expected, found))
    largest = _SAME_EXAMPLE * spread + rounding
    pairs = paired(expected, found, groups, other_groups, same_example=largest, spread=spread)
    if pairs.relabelled:
        return f"other labels (of {pairs.relabelled} of {len(groups)} examples)"
    if not pairs.is_complete:
        return None
    if pairs.unpaired > _REROUTED * len(groups) * (not pairs.is_exact):
        return f"other inputs (the model's logits differ for {pairs.unpaired} of {len(groups)} examples)"
    return ""


def _other_counts(counts: Tensor, found: Tensor) -> str:
    differing = (counts != found).nonzero().flatten().tolist()
    shown = ", ".join(f"{int(found[at])} instead of {int(counts[at])} of {_name(at)}" for at in differing[:3])
    return f"other labels ({shown}{', ...' if differing[3:] else ''})"


def _scales(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The spread of the centred logits between examples, and the rounding of logits in bfloat16."""
    centred = _centred(logits)
    spread = centred.std(0).square().mean().sqrt() if len(centred) > 1 else centred.square().mean().sqrt()
    return spread, _ROUNDING * logits[logits.isfinite()].square().mean().sqrt()


def _centred(logits: Tensor) -> Tensor:
    """Logits minus the mean of the present classes, 0 for absent ones."""
    present = logits > -torch.inf
    values = torch.where(present, logits, 0)
    return (values - values.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)) * present


def _matrix(num_classes: int) -> Tensor:
    """Fixed projections `[K, 8]`, of which each row depends on its class alone."""
    classes, columns = torch.meshgrid(
        torch.arange(1, num_classes + 1), torch.arange(1, _PROJECTIONS + 1), indexing="ij"
    )
    return (2.399963 * (classes * columns).double()).cos()


def integer_labels(labels: Any, size: int) -> Tensor:
    """Labels `[B]` int64 as `class_logits` returned them; `NO_LABEL` if they are no integers `[B]`.

    Args:
        labels: The labels, or anything.
        size: Number of examples B.
    """
    if not isinstance(labels, Tensor) or labels.shape != (size,) or labels.is_floating_point() or labels.is_complex():
        return torch.full((size,), NO_LABEL)
    return labels.detach().long()


def _name(group: int) -> str:
    return f"label {group - 1}" if group else "no label"
