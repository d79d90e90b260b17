"""The data that a fit is given, compared with those of the existing fit that it completes.

All methods of a table share the data that they are fitted on: two calibration splits behind one table would make its
rows incomparable, and a posterior from one split with a prior precision from another would belong to neither.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.experts.data_record import (
    DataRecord,
    record_of,
)
from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.data_differences import (
    Split,
    iterates_once,
    log_doubt,
    num_rows,
    refuse,
    split_difference,
    training_difference,
)
from bmoe_lightning.methods.needs import Available, NeedsError, check_needs
from bmoe_lightning.methods.plain_passes import NO_EXAMPLES, Counts, PlainPasses
from bmoe_lightning.methods.training_data import TrainingData
from bmoe_lightning.utils.distributed import gather_number
from bmoe_lightning.utils.random_state import unchanged_global_random_states, unchanged_random_state

_TOO_MANY = "their order differs, and there are too many to be compared in any order"
_VARYING = "they differ from one pass to the next (random augmentation, or a sampler with a random state of its own)"


class GivenData:
    """The data that a fit is given, and what is known of those of the existing fit.

    Args:
        model: The model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        training: Training data.
        calibration: Held-out data, or None.
        split: Held-out logits and labels of the existing fit, if it used any.
        training_record: Record of the training data of the existing fit, if it has one.
        distributed: Whether all ranks of torch.distributed's default group take part, each with its shard of the data.
        is_checked: Whether the number of held-out data, and the labels of the first batch, are known to be what is
            needed, if the number of entries is known.

    Attributes:
        split: Held-out logits and labels of the fit, as far as known.
        training_record: Record of the training data of the fit, as far as known.
    """

    def __init__(
        self,
        model: nn.Module,
        class_logits: ClassLogits,
        training: TrainingData,
        calibration: Iterable[Any] | None,
        split: Split | None = None,
        training_record: DataRecord | None = None,
        *,
        distributed: bool = False,
        is_checked: bool = False,
    ) -> None:
        self._is_checked = is_checked
        self.split = self._known_split = split
        self.training_record = self._known_training = training_record
        self._passes = PlainPasses(model, class_logits, distributed=distributed)
        self._training = training
        self._calibration = calibration
        self._distributed = distributed
        self._varies: bool | None = None
        self._is_warned = False

    def check_needs(self, methods: Sequence[Method]) -> None:
        """Check that there are as many held-out inputs as methods need, and labels, before the passes. A collective.

        Where the existing fit does not tell, as many examples are looked at in plain forward passes as are needed; data
        that can be iterated over only once are checked after their pass.

        Args:
            methods: Methods to fit.

        Raises:
            NeedsError: If there are too few inputs, or no labels.
            DataMismatchError: If there are more examples than the existing fit has.
            ValueError: If a label is not that of a class.
        """
        needing = [method for method in methods if method.needs.calibration]
        if not needing:
            return
        labelled = [method.name for method in needing if method.needs.calibration_labels]
        needed = max([1, *(method.needs.calibration_inputs for method in needing)])
        known = None if self._known_split is None else _counts_of(self._known_split)
        found = known
        if known is None or known.examples < needed or (labelled and known.unlabelled):
            if self._is_checked and self._num_entries(self._calibration) >= 0:
                return
            again = self._calibration is not None and not iterates_once(self._calibration)
            found = self._counts_up_to(needed, labelled=bool(labelled)) if again else known
        if found is None:
            return
        if not found.examples:
            raise NeedsError(NO_EXAMPLES)
        check_needs(needing, Available(calibration_inputs=max(found.examples, found.expected), runs=True))
        if known is not None and known.examples < needed:
            refuse("held-out", f"{needed} or more examples instead of {known.examples}")
        if labelled and found.unlabelled:
            raise NeedsError(
                f"{', '.join(labelled)} are fitted on held-out labels, and {found.unlabelled} of the first "
                f"{found.examples} examples have none: class_logits returns (logits, None) for them; return "
                "(logits, labels), or remove these methods"
            )

    def check_calibration(self, *, passed_over: bool, collects: bool) -> None:
        """Compare the held-out data, if there are any, as far as they are not compared later. A collective.

        Args:
            passed_over: Whether a pass for the methods follows, which compares all of them.
            collects: Whether a curvature is collected before that, so that a difference should be told now.

        Raises:
            DataMismatchError: If they are others than those of the existing fit.
        """
        if self._calibration is None or self._known_split is None:
            return
        if passed_over:
            if not collects or iterates_once(self._calibration):
                return
            if not record_of(*self._known_split).beginning(self._passes.record(self._calibration, 1)):
                return
        self.plain_split()

    def check_training(self, passes: Collection[int | None]) -> None:
        """Compare the training data, if there are any. A collective.

        The first batch is compared. If it differs, the data may be the same in another order: then all are compared,
        unless a curvature pass follows that does so, or the order changes from pass to pass.

        Args:
            passes: `max_batches` of the curvature passes that follow; one over as much of the data compares all of it.

        Raises:
            DataMismatchError: If they are others than those of the existing fit, and the same in every pass.
        """
        known, once = self._known_training, iterates_once(self._training)
        if known is None:
            log_doubt(
                "it is unknown whether the training data are those of the existing fit, which was written without a "
                "record of them; if they are others, fit all methods again in another folder"
            )
            return
        if once and passes:
            return
        with unchanged_global_random_states():
            batches = self._training.batches(known.max_batches)
            first = self._passes.record(batches, 1)
            beginning = known.beginning(first) if first.num_examples else ""
            is_as_many = not first.num_examples or self._may_be_as_many(batches, first, known)
            if beginning == "" and is_as_many:
                return
            if once:
                self._warn_of_training("they can be read only once, and the first batch or their number differs")
            elif first.beginning(self._passes.record(self._training.batches(known.max_batches), 1)) != "":
                if known.max_batches not in passes:
                    self._warn_of_training(_VARYING)
            elif beginning is not None or known.max_batches not in passes or not is_as_many:
                passed = self._passed_over_training()
                difference = training_difference(known, passed[0])
                self._refuse_training(difference and (beginning or difference), passed)

    def see_training(self, found: DataRecord | None) -> None:
        """Compare the record of a curvature pass; None if it is incomplete. Their order may differ. A collective.

        Raises:
            DataMismatchError: If the data are others than those of the existing fit, and the same in every pass.
        """
        known = self._known_training
        if self.training_record is None:
            self.training_record = found
        if known is None or found is None:
            return
        is_same_part = known.max_batches == found.max_batches
        self._refuse_training(training_difference(known, found) if is_same_part else known.beginning(found) or "")

    def seen_split(self, found: Split) -> Split:
        """Compare held-out logits and labels of a pass over all data. Their order may differ.

        Returns:
            The given ones.

        Raises:
            DataMismatchError: If they are others than those of the existing fit.
        """
        known = self._known_split
        if known is None:
            self.split = found
            return found
        difference = split_difference(known, found)
        refuse("held-out", difference)
        if difference is None:
            log_doubt(
                f"it is unknown whether the held-out data are those of the existing fit: {_TOO_MANY}; if they are "
                "others, fit all methods again in another folder"
            )
        if known[1] is None:
            self.split = found  # the same inputs, now with labels
        return found

    def plain_split(self) -> Split:
        """Logits and labels of the held-out data, from plain forward passes. A collective, if distributed.

        Raises:
            DataMismatchError: If they are others than those of the existing fit.
            ValueError: If there are no examples.
        """
        assert self._calibration is not None
        return self.seen_split(self._passes.split(self._calibration))

    def _counts_up_to(self, needed: int, *, labelled: bool) -> Counts:
        """Count the first held-out examples: those of one batch, or as many as it takes to have the needed ones.

        One batch is enough where the number of entries or batches tells.
        """
        data: Any = self._calibration
        with unchanged_random_state(data):
            limit, found = 1, self._passes.counts(data, 1, labelled=labelled)
            entries = self._num_entries(data) if found.rows == found.examples else -1
            expected = max(entries, (min(self._num_batches(data)) - 1) * found.examples)
            if expected >= needed:
                return replace(found, expected=expected)
            while 0 < found.examples < needed and found.batches == limit:
                limit = math.ceil(limit * needed / found.examples)
                found = self._passes.counts(data, limit, labelled=labelled)
        return found

    def _passed_over_training(self, seed: int | None = None) -> tuple[DataRecord, Split]:
        """The record of the training data, and their logits too; see `PlainPasses.record_and_split`."""
        assert self._known_training is not None
        limit = self._known_training.max_batches
        return self._passes.record_and_split(self._training.batches(limit), max_batches=limit, seed=seed)

    def _refuse_training(self, difference: str, passed: tuple[DataRecord, Split] | None = None) -> None:
        """Refuse the training data, unless two passes over them differ as well. A collective, if distributed."""
        if not difference:
            return
        reason = _VARYING  # once it was told
        if self._varies is None and not iterates_once(self._training):
            with unchanged_global_random_states():
                one = self._passed_over_training() if passed is None else passed
                other = self._passed_over_training(seed=one[0].num_examples)
            found = split_difference(one[1], other[1])
            self._varies, reason = found != "", _TOO_MANY if found is None else _VARYING
        if not self._varies:
            refuse("training", difference)
        self._warn_of_training(reason)

    def _warn_of_training(self, reason: str) -> None:
        if not self._is_warned:
            log_doubt(
                f"it is unknown whether the training data are those of the existing fit: {reason}; if they are others, "
                "fit all methods again in another folder"
            )
        self._is_warned = True

    def _may_be_as_many(self, batches: Any, first: DataRecord, known: DataRecord) -> bool:
        """Whether there may be as many examples, from what is known without a pass. A collective, if distributed."""
        entries = self._num_entries(batches)
        if entries >= 0:
            return entries == known.num_examples
        lengths, size = self._num_batches(batches), first.num_examples
        longest = max(lengths)
        return min(lengths) < 0 or (longest - 1) * size < known.num_examples <= longest * size

    def _num_entries(self, batches: Any) -> int:
        """Number of entries of all ranks' batches, -1 if it is unknown. A collective, if distributed."""
        entries = getattr(batches, "num_entries", None)  # of all ranks
        if entries is not None:
            return int(entries)
        here = num_rows(batches)
        rows = gather_number(here) if self._distributed else [here]
        return sum(rows) if min(rows) >= 0 else -1

    def _num_batches(self, batches: Any) -> list[int]:
        """Number of batches on each rank, -1 where it is unknown. A collective, if distributed."""
        try:
            length = len(batches)
        except (TypeError, OverflowError):
            length = -1
        return gather_number(length) if self._distributed else [length]


def _counts_of(split: Split) -> Counts:
    return Counts(len(split[0]), len(split[0]) if split[1] is None else 0)
