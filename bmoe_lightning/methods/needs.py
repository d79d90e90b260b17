"""What methods need besides the model, and one check of it for whoever runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bmoe_lightning.methods.base import Method


@dataclass(frozen=True)
class Needs:
    """What must be there besides the model.

    The callback, the recipes and the documentation read this; none of them knows a method by name.

    Attributes:
        calibration_inputs: Least number of held-out inputs; their labels are not looked at.
        calibration_labels: Whether the labels of the held-out inputs are looked at.
        prior_mean: Whether the weights from before fine-tuning are looked at.
        snapshots: Least number of snapshots of the trained weights, one after each epoch; 0 for none.
        max_snapshots: How many of the last snapshots are used.
        runs: Number of further fine-tuning runs with other seeds, whose weights the option `runs` takes.
        expert_dropout: Whether the model is meant to be fine-tuned with dropout inside the experts.
    """

    calibration_inputs: int = 0
    calibration_labels: bool = False
    prior_mean: bool = False
    snapshots: int = 0
    max_snapshots: int = 0
    runs: int = 0
    expert_dropout: bool = False

    @property
    def calibration(self) -> bool:
        """Whether held-out data are passed over."""
        return self.calibration_labels or self.calibration_inputs > 0

    def describe(self) -> str:
        """A phrase for a table, such as `held-out labels, the weights from before fine-tuning`."""
        parts = []
        if self.calibration_labels:
            parts.append("held-out labels")
        if self.calibration_inputs > 1:
            parts.append(f"{self.calibration_inputs} held-out inputs")
        if self.prior_mean:
            parts.append("the weights from before fine-tuning")
        if self.snapshots:
            parts.append(f"snapshots after at least {self.snapshots} epochs")
        if self.runs:
            parts.append(f"{self.runs} further fine-tuning run{'s' * (self.runs > 1)}")
        if self.expert_dropout:
            parts.append("expert dropout in training")
        return ", ".join(parts)


@dataclass(frozen=True)
class Available:
    """What a run offers to methods; None where that is not known yet.

    Attributes:
        calibration_inputs: Number of held-out inputs; 0 where there is no such split.
        snapshots: Number of snapshots that there will be: one an epoch.
        prior_mean: Whether the weights from before fine-tuning are known.
        expert_dropout: Dropout probability inside the experts while fine-tuning.
        runs: Whether whoever asks makes further fine-tuning runs by itself.
    """

    calibration_inputs: int | None = None
    snapshots: int | None = None
    prior_mean: bool | None = None
    expert_dropout: float | None = None
    runs: bool = False


class NeedsError(ValueError):
    """A run lacks what a method needs."""


def check_needs(methods: Sequence[Method], available: Available) -> None:
    """Refuse methods that a run could not fit or predict with in the end.

    Args:
        methods: Methods of the run.
        available: What the run offers.

    Raises:
        NeedsError: Naming the methods, what they need and what there is.
    """
    for method in methods:
        needs, found = method.needs, available
        if needs.calibration and found.calibration_inputs == 0:
            raise NeedsError(
                f"{', '.join(m.name for m in methods if m.needs.calibration)} need a validation split to be fitted "
                "on, and the trainer has none (no validation loader, no validation_step, or limit_val_batches=0). Add "
                "one, or leave these methods out"
            )
        if found.calibration_inputs is not None and found.calibration_inputs < needs.calibration_inputs:
            raise NeedsError(
                f"{method.name} needs at least {needs.calibration_inputs} inputs of the validation split, and there "
                f"are {found.calibration_inputs}; add data, or leave it out of the methods"
            )
        if found.snapshots is not None and found.snapshots < needs.snapshots:
            raise NeedsError(
                f"{method.name} needs the weights after at least {needs.snapshots} epochs, and there will be "
                f"{found.snapshots}; train for more epochs, or leave it out of the methods"
            )
        if needs.prior_mean and found.prior_mean is False:
            raise NeedsError(
                f"{method.name} measures how far fine-tuning moved the experts, and the checkpoint has overwritten the "
                "weights from before: a load_state_dict that does not call torch.nn.Module's goes unnoticed. Build the "
                "model in the module's __init__, give it prior_mean='zero', or leave it out of the methods"
            )
        if needs.expert_dropout and found.expert_dropout == 0:
            raise NeedsError(
                f"{method.name} is meant for a model that was fine-tuned with expert dropout, which is 0 here; set it, "
                "or leave the method out"
            )
        if needs.runs and not found.runs:
            raise NeedsError(
                f"{method.name} needs the weights of {needs.runs} further fine-tuning runs: give it runs=, one "
                "snapshot file for each"
            )
