"""Plain forward passes over data, for what is known of the data alone: records, logits and labels, counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.experts.counted_batch import count_of, lockstep, plain_batch
from bmoe_lightning.experts.data_record import DataRecord, DataRecorder, integer_labels
from bmoe_lightning.experts.logits_contract import NO_LABEL, checked_labels, joined_logits
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.data_differences import Split, first_size
from bmoe_lightning.utils.distributed import failing_together, gather_examples, gather_number
from bmoe_lightning.utils.random_state import unchanged_random_state

NO_EXAMPLES = "no calibration examples: the calibration split is empty; add examples"


@dataclass(frozen=True)
class Counts:
    """Numbers of examples, of those without labels, of rows of tensors (-1 for none) and of batches on a rank.

    Attributes:
        expected: Number of examples that there are expected to be in all.
    """

    examples: int
    unlabelled: int
    rows: int = -1
    batches: int = 0
    expected: int = 0


class PlainPasses:
    """Plain forward passes over the data of a fit. Each is a collective, if distributed.

    Args:
        model: The model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        distributed: Whether all ranks of torch.distributed's default group take part, each with its shard of the data.
    """

    def __init__(self, model: nn.Module, class_logits: ClassLogits, *, distributed: bool) -> None:
        self._model = model
        self._class_logits = class_logits
        self._distributed = distributed

    def split(self, batches: Iterable[Any]) -> Split:
        """Logits and labels of all examples.

        Raises:
            ValueError: If there are none, or a label is no integer.
        """
        builder = _SplitBuilder()
        with failing_together(distributed=self._distributed):
            for batch in lockstep(self._model, batches):
                view = self._view(batch)
                missing = torch.full((len(view.logits),), NO_LABEL)
                labels = missing if view.labels is None else checked_labels(view.labels, view.logits, values=False)
                builder.add(view.logits, labels, count_of(batch, len(labels)))
        return builder.finish(distributed=self._distributed)

    def counts(self, batches: Iterable[Any], max_batches: int, *, labelled: bool) -> Counts:
        """Count the examples of the first batches of all ranks.

        Args:
            batches: The batches.
            max_batches: Maximum number of batches of each rank.
            labelled: Whether the values of labels are checked.

        Raises:
            ValueError: If a label is not that of a class.
        """
        examples = unlabelled = rows = number = 0
        with failing_together(distributed=self._distributed):
            for batch in islice(lockstep(self._model, batches), max_batches):
                number += 1
                view = self._view(batch)
                logits = view.logits[: count_of(batch, len(view.logits))]
                examples, rows = examples + len(logits), rows + first_size(batch)
                if view.labels is None:
                    unlabelled += len(logits)
                elif labelled:
                    labels = checked_labels(view.labels, view.logits, values=False)[: len(logits)]
                    checked_labels(labels, logits)
        if self._distributed:
            examples, unlabelled, rows = (sum(gather_number(count)) for count in (examples, unlabelled, rows))
            number = max(gather_number(number))
        return Counts(examples, unlabelled, rows, number)

    def record(self, batches: Iterable[Any], max_batches: int | None = None) -> DataRecord:
        """The record of the first batches of each rank, or of all."""
        recorder = DataRecorder(distributed=self._distributed)
        with unchanged_random_state(batches), failing_together(distributed=self._distributed):
            for batch in islice(lockstep(self._model, batches), max_batches):
                view = self._view(batch)
                recorder.add(view.logits, view.labels, count_of(batch, len(view.logits)))
        record = recorder.finish()
        assert record is not None
        return record

    def record_and_split(
        self, batches: Iterable[Any], *, max_batches: int | None, seed: int | None = None
    ) -> tuple[DataRecord, Split]:
        """The record of batches, and the logits and integer labels of all their examples.

        Args:
            batches: The batches.
            max_batches: Their maximum number on each rank, for the record; None if they are all of the data.
            seed: Seed of torch's random state, which orders and augments data that seed no random state of their own.
        """
        recorder, builder = DataRecorder(distributed=self._distributed, max_batches=max_batches), _SplitBuilder()
        with unchanged_random_state(batches), failing_together(distributed=self._distributed):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            for batch in lockstep(self._model, batches):
                view = self._view(batch)
                count = count_of(batch, len(view.logits))
                recorder.add(view.logits, view.labels, count)
                builder.add(view.logits, integer_labels(view.labels, len(view.logits)), count)
        record = recorder.finish()
        assert record is not None
        return record, builder.finish(distributed=self._distributed)

    def _view(self, batch: Any) -> BatchView:
        return BatchView(self._model, self._class_logits, plain_batch(batch))


class _SplitBuilder:
    """Collects logits and labels of a pass without curvature."""

    def __init__(self) -> None:
        self._logits: list[Tensor] = []
        self._labels = [torch.empty(0, dtype=torch.int64)]

    def add(self, logits: Tensor, labels: Tensor, num_counted: int) -> None:
        self._logits.append(logits[:num_counted].cpu())
        self._labels.append(labels[:num_counted].cpu())

    def finish(self, *, distributed: bool) -> Split:
        num_classes = max((part.shape[1] for part in self._logits), default=0)
        if distributed:
            num_classes = max(gather_number(num_classes))
        # A rank without a batch contributes no rows, of that many classes.
        self._logits.append(torch.empty(0, num_classes, dtype=torch.float64))
        logits, labels = joined_logits(self._logits, num_classes), torch.cat(self._labels)
        if distributed:
            logits, labels = gather_examples(logits), gather_examples(labels)
        if not len(labels):
            raise ValueError(NO_EXAMPLES)
        return logits, None if bool((labels == NO_LABEL).all()) else labels
