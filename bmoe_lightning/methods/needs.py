"""Requirements of methods besides the model, and their check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bmoe_lightning.methods.base import Method


@dataclass(frozen=True)
class Needs:
    """Requirements of a method besides the model.

    The callback, the recipes and the documentation read this, so that none of them depends on method names.

    Attributes:
        calibration_inputs: Minimum number of held-out inputs; their labels are not used.
        calibration_labels: Whether the labels of the held-out inputs are used.
        advised_labels: Number of held-out labels below which the fit carries a warning: with fewer, the method was
            measured to be worse than simpler ones (see docs/reading_the_results.md).
        training_labels: Whether the labels of training examples are used.
        prior_mean: Whether the weights from before fine-tuning are used.
        snapshots: Minimum number of snapshots of the trained weights, one per epoch; 0 for none.
        max_snapshots: Maximum number of snapshots, the latest ones.
        runs: Number of further fine-tuning runs with other seeds, whose snapshots go into the option `runs`.
        run_methods: Methods that are fitted to each of these runs; the folders of the fits go into the option `fits`.
        expert_dropout: Whether the model should be fine-tuned with dropout inside the experts, or in front of LoRA's
            matrices.
        lora: Whether the model has to be fine-tuned with LoRA.
        gradient_share: Whether the share of the trained weights' gradient that its curvatures cover is used, which is
            measured in their pass over the training data.
        routers: Whether the logits of the model's routers are replaced, so that these have to be supported.
        router_training: Whether the fit trains routers, which takes some epochs of forward and backward passes.
    """

    calibration_inputs: int = 0
    calibration_labels: bool = False
    advised_labels: int = 0
    training_labels: bool = False
    prior_mean: bool = False
    snapshots: int = 0
    max_snapshots: int = 0
    runs: int = 0
    run_methods: tuple[Method, ...] = ()
    expert_dropout: bool = False
    lora: bool = False
    gradient_share: bool = False
    routers: bool = False
    router_training: bool = False

    @property
    def calibration(self) -> bool:
        """Whether held-out data are used."""
        return self.calibration_labels or self.calibration_inputs > 0

    def describe(self) -> str:
        """A phrase for a table, such as `held-out labels, the weights from before fine-tuning`."""
        parts = []
        if self.calibration_labels:
            advised = f" ({self.advised_labels} or more are advised)" if self.advised_labels else ""
            parts.append(f"held-out labels{advised}")
        if self.calibration_inputs > 1:
            parts.append(f"{self.calibration_inputs} held-out inputs")
        if self.training_labels:
            parts.append("labels of training examples")
        if self.prior_mean:
            parts.append("the weights from before fine-tuning")
        if self.snapshots:
            parts.append(f"snapshots after at least {self.snapshots} epochs")
        if self.runs:
            fits = f" with a fit of {self.names_of_run_methods} to each" if self.run_methods else ""
            parts.append(f"{self.runs} further fine-tuning run{'s' * (self.runs > 1)}{fits}")
        if self.expert_dropout:
            parts.append("expert dropout in training")
        if self.lora:
            parts.append("a model fine-tuned with LoRA")
        if self.routers:
            trained = ", and some epochs of training beside them" if self.router_training else ""
            parts.append(f"routers that compute their logits by one linear map{trained}")
        return ", ".join(parts)

    @property
    def names_of_run_methods(self) -> str:
        """The names of `run_methods`, for messages."""
        # The registered ones, under whatever names they are fitted.
        return ", ".join(getattr(type(method), "name", method.name) for method in self.run_methods)


@dataclass(frozen=True)
class Available:
    """What a run provides to methods; None where that is not known yet.

    Attributes:
        calibration_inputs: Number of held-out inputs; 0 without a calibration split.
        snapshots: Number of snapshots at the end of training, one per epoch.
        prior_mean: Whether the weights from before fine-tuning are known.
        expert_dropout: Dropout probability inside the experts, or of LoRA, during fine-tuning.
        runs: Whether the caller trains the further fine-tuning runs itself.
        lora: Whether the model is fine-tuned with LoRA.
    """

    calibration_inputs: int | None = None
    snapshots: int | None = None
    prior_mean: bool | None = None
    expert_dropout: float | None = None
    runs: bool = False
    lora: bool | None = None


class NeedsError(ValueError):
    """A run does not meet the requirements of a method."""


def check_needs(methods: Sequence[Method], available: Available) -> None:
    """Check that a run meets the requirements of its methods.

    Args:
        methods: Methods of the run.
        available: What the run provides.

    Raises:
        NeedsError: If it does not; the message names the method, its requirement and what was found.
    """
    for method in methods:
        needs, found = method.needs, available
        if needs.calibration and found.calibration_inputs == 0:
            raise NeedsError(
                f"{', '.join(m.name for m in methods if m.needs.calibration)} are fitted on a validation split, "
                "and the trainer has none (no validation loader, no validation_step, or limit_val_batches=0). Add one, "
                "or remove these methods."
            )
        if found.calibration_inputs is not None and found.calibration_inputs < needs.calibration_inputs:
            raise NeedsError(
                f"{method.name} needs at least {needs.calibration_inputs} inputs of the validation split, and there "
                f"are {found.calibration_inputs}; add data, or remove the method"
            )
        if found.snapshots is not None and found.snapshots < needs.snapshots:
            raise NeedsError(
                f"{method.name} needs the weights after at least {needs.snapshots} epochs, and there will be "
                f"{found.snapshots}; train for more epochs, or remove the method"
            )
        if needs.prior_mean and found.prior_mean is False:
            raise NeedsError(
                f"{method.name} measures how far fine-tuning moved the weights, and the checkpoint has overwritten the "
                "weights from before (a load_state_dict that does not call that of torch.nn.Module runs no hook). "
                "Build the model in the module's __init__, use prior_mean='zero', or remove the method."
            )
        if needs.expert_dropout and found.expert_dropout == 0:
            raise NeedsError(
                f"{method.name} needs a model that was fine-tuned with expert dropout, which is 0 here; set it, or "
                "remove the method"
            )
        if needs.lora and found.lora is False:
            raise NeedsError(
                f"{method.name} has its posterior over the matrices of LoRA, and this run trains other weights; "
                "fine-tune with LoRAFinetuner, or remove the method"
            )
        if needs.runs and not found.runs:
            fits = f", and fits= with the folder of a fit of {needs.names_of_run_methods} to each of them"
            raise NeedsError(
                f"{method.name} needs the weights of {needs.runs} further fine-tuning runs; pass runs= with one "
                f"snapshot file for each{fits if needs.run_methods else ''}"
            )
