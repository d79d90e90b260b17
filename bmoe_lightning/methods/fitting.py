"""The fit of a table of methods to one model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.experts import ClassLogits, ExpertLayer, weight_fingerprint
from bmoe_lightning.experts.discovery import locate_expert_layers
from bmoe_lightning.experts.fsdp import check_collective
from bmoe_lightning.experts.used_weights import UsedWeights
from bmoe_lightning.experts.weight_record import weight_record
from bmoe_lightning.methods.base import Method, check_method_names
from bmoe_lightning.methods.curvature_warnings import warn_of_discarded_energy
from bmoe_lightning.methods.data_differences import Split
from bmoe_lightning.methods.fit_result import FitResult, FittedMethod
from bmoe_lightning.methods.label_warnings import warn_of_chance, warn_of_few_labels
from bmoe_lightning.methods.posterior_summary import posterior_summary
from bmoe_lightning.methods.snapshots import check_snapshots, fit_of
from bmoe_lightning.methods.training_data import Batches, PassFiles, TrainingData
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.utils.distributed import broadcast_, is_rank_zero, num_processes, sum_over_processes
from bmoe_lightning.utils.fit_warnings import collected_fit_warnings

_logger = logging.getLogger(__name__)


def fit_methods(
    methods: Sequence[Method],
    model: nn.Module,
    class_logits: ClassLogits,
    training: TrainingData | Iterable[Any],
    calibration: Iterable[Any] | None = None,
    *,
    prior_mean: Mapping[str, Tensor] | None = None,
    snapshots: Sequence[Path] = (),
    earlier: FitResult | None = None,
    trained: Sequence[nn.Parameter] | None = None,
    seed: int = 0,
    distributed: bool = False,
    pass_files: PassFiles | None = None,
    fit_id: str | None = None,
    is_checked: bool = False,
    tell: Callable[[str], None] | None = None,
) -> FitResult:
    """Fit methods in one pass over the training data per curvature and one shared pass over the held-out data.

    Args:
        methods: Methods with distinct names; see `Method.with_defaults`.
        model: The trained model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        training: Training data; used only if a method has a curvature.
        calibration: Held-out data; used only if a method needs them. None uses what `earlier` stores of its own, which
            suffices for methods without covariances.
        prior_mean: Weights from before fine-tuning by qualified parameter name (see `down_proj_weights`), for methods
            that use the evidence with `prior_mean="pretrained"`.
        snapshots: Snapshots of the trained weights after the last epochs, latest last, for methods that need them.
        earlier: Earlier fit to the same weights and data; its methods are fitted again only if their options differ, or
            if they had less memory for the covariance terms than they needed and now have more.
        trained: The parameters that were trained, for the share of their gradient that a posterior covers; by default
            those that require gradients, and the line on the curvature says so.
        seed: Seed for sampled labels, sketch matrices and Monte Carlo noise.
        distributed: Whether all ranks of torch.distributed's default group call this, each with its shard of the data:
            examples r, r + W, r + 2 W, ... for rank r of W, and, where weights are sharded, in equally many batches of
            equal sizes (see `CountedBatch`). All ranks get the result of one process with all the data, to rounding.
            False runs no collective, even if a process group exists.
        pass_files: Location of the checkpoints of curvature passes, from which a killed pass resumes; remove them with
            `remove_checkpoint` once the fit is written.
        fit_id: Identifier of a new fit; by default that of the snapshots, if methods use them, or a random one.
        is_checked: Whether the caller has checked that there are as many held-out inputs as methods need, and labels,
            which is otherwise done before the passes; see `GivenData.check_needs`.
        tell: Function that gets one line on each new curvature (see `posterior_summary`), on rank zero; by default the
            lines are logged at level INFO.

    Returns:
        The fit; with `earlier`, that one completed by the missing methods.

    Raises:
        NeedsError: If there are fewer held-out inputs than a method needs, or no labels.
        ValueError: If data, labels, the prior mean or a curvature's layers are missing, ranks have different weights, a
            checkpoint belongs to another curvature pass, a snapshot to another fit, or `earlier` has another seed.
        DataMismatchError: If data that a method uses are others than those of `earlier`; their order may differ.
        WeightMismatchError: If `earlier` was fitted to other weights.
        OSError: If a checkpoint cannot be written.
    """
    check_method_names(methods)
    check_collective(model, distributed=distributed)
    is_new = earlier is None
    used_snapshots = snapshots if any(method.needs.max_snapshots for method in methods) else ()
    if earlier is None:
        earlier = _new_fit(methods, model, seed, fit_id or fit_of(used_snapshots))
        if distributed:
            _check_same(earlier.fingerprint)
    else:
        _check_completed(earlier, model, seed)
    check_snapshots(used_snapshots, earlier.fit_id)
    missing = [method for method in methods if not earlier.is_finished(method)]
    used = UsedWeights(model, locate_expert_layers(model, earlier.layers))
    used.add(module for method in missing for module in method.modules_beside(model))
    class_logits = used.observed(class_logits)
    work = Workbench(
        model,
        class_logits,
        missing,
        training if isinstance(training, TrainingData) else Batches(training),
        calibration,
        prior_mean=prior_mean,
        snapshots=snapshots,
        posteriors=earlier.posteriors,
        shares=earlier.shares,
        calibration_logits=earlier.calibration,
        training_record=earlier.training,
        trained=trained,
        seed=earlier.seed,
        distributed=distributed,
        pass_files=pass_files,
        is_checked=is_checked,
    )
    work.check_before_passes()
    work.check_given_data(methods)
    _collect(missing, work, tell or partial(_logger.info, "%s"))
    fitted = {}
    for method in missing:
        with collected_fit_warnings() as doubts:
            found = _fitted(method, work)
            _warn_of_inputs(method, work)
        # A copy: a state may be an expanded tensor, or share memory with a weight or another entry. Each entry is freed
        # when it is copied: together they may be several times the trained weights.
        state = {key: found.pop(key).detach().cpu().contiguous().clone() for key in list(found)}
        if distributed:
            broadcast_(list(state.values()))
        digests = tuple(curvature.digest for curvature in method.curvatures)
        limited = work.limited_terms(method)
        fitted[method.name] = FittedMethod(state, method.fit_options(), digests, tuple(doubts), limited)
    collected = {digest: p for digest, p in work.posteriors.items() if p.factors.rank > 0}
    calibration = work.given.split
    doubts_of_model = _doubts_of_model(missing, calibration)
    if is_rank_zero():
        _log_warnings(fitted, [sentence for sentence in doubts_of_model if sentence not in earlier.warnings])
    warnings = tuple(dict.fromkeys([*earlier.warnings, *doubts_of_model]))
    completed = replace(earlier.with_methods(fitted, collected), shares=work.shares)
    if missing:
        weights = used.added_to(earlier.weights, distributed=distributed, all_without_calls=is_new)
        completed = replace(completed, weights=weights)
    return replace(completed, calibration=calibration, training=work.given.training_record, warnings=warnings)


def _fitted(method: Method, work: Workbench) -> dict[str, Tensor]:
    """The state of a method; a refusal names it."""
    try:
        return dict(method.fit(work))
    except ValueError as error:
        if type(error) is not ValueError or method.name in str(error):
            raise
        raise ValueError(f"{method.name} cannot be fitted: {error}") from error


def _collect(methods: Sequence[Method], work: Workbench, tell: Callable[[str], None]) -> None:
    """Collect the curvatures that are missing, and tell one line on each."""
    for method in methods:
        for curvature in method.curvatures:
            is_new = curvature.collects and curvature.digest not in work.posteriors
            posterior = work.posterior(curvature)
            if is_new and is_rank_zero():
                tell(posterior_summary(posterior, work.shares.get(curvature.digest)))


def _doubts_of_model(methods: Sequence[Method], calibration: Split | None) -> list[str]:
    """What makes the predictions of all methods doubtful: the model's accuracy, if labels are used."""
    with collected_fit_warnings() as doubts:
        # The labels may be placeholders where no method uses them.
        if calibration is not None and any(method.needs.calibration_labels for method in methods):
            warn_of_chance(*calibration)
    return doubts


def _warn_of_inputs(method: Method, work: Workbench) -> None:
    """Warn of what makes the fit of any method doubtful: the curvatures and the number of labels."""
    for curvature in method.curvatures:
        warn_of_discarded_energy(work.posterior(curvature))
    if method.needs.advised_labels:
        warn_of_few_labels(method.needs, len(work.labelled_logits()[1]))


def _log_warnings(fitted: Mapping[str, FittedMethod], of_model: Sequence[str]) -> None:
    """One line for each distinct warning, with the methods that it is about."""
    for sentence in of_model:
        _logger.warning("%s", sentence)
    sentences = dict.fromkeys(sentence for entry in fitted.values() for sentence in entry.warnings)
    for sentence in sentences:
        names = [name for name, entry in fitted.items() if sentence in entry.warnings]
        _logger.warning("%s: %s", ", ".join(names), sentence)


def _new_fit(methods: Sequence[Method], model: nn.Module, seed: int, fit_id: str | None) -> FitResult:
    layers = fingerprinted_layers(methods, model)
    fit = FitResult(
        fingerprint=weight_fingerprint(model, layers),
        layers=tuple(layers),
        seed=seed,
        weights=weight_record(model, layers),
    )
    return fit if fit_id is None else replace(fit, fit_id=fit_id)


def _check_completed(fit: FitResult, model: nn.Module, seed: int) -> None:
    """Check that a fit is one to a model's weights, and has the seed."""
    fit.check_weights(model)
    if fit.seed != seed:
        raise ValueError(
            f"the existing fit has seed {fit.seed}, which all its methods share, and seed={seed} differs; pass the "
            "same seed, or fit into another folder"
        )


def fingerprinted_layers(methods: Sequence[Method], model: nn.Module) -> list[ExpertLayer]:
    """The layers whose MoE blocks the fingerprint covers: those of the first curvature, else the model's experts."""
    curvatures = [curvature for method in methods for curvature in method.curvatures]
    return (curvatures[0] if curvatures else Curvature()).find_layers(model)


def prior_mean_layers(methods: Sequence[Method], model: nn.Module) -> list[ExpertLayer]:
    """The layers whose weights from before fine-tuning methods use, without duplicates."""
    curvatures = [curvature for method in methods if method.needs.prior_mean for curvature in method.curvatures]
    return list({layer.name: layer for curvature in curvatures for layer in curvature.find_layers(model)}.values())


def _check_same(fingerprint: str) -> None:
    """Check that the weights are the same on all ranks. A collective."""
    here = torch.frombuffer(bytearray.fromhex(fingerprint), dtype=torch.uint8).long()
    first = here.clone()
    broadcast_([first])
    differing = torch.tensor([int(not torch.equal(here, first))])
    sum_over_processes([differing])
    if int(differing):
        raise ValueError(
            f"the model's weights on {int(differing)} of {num_processes()} ranks differ from those of rank 0; fit "
            "after training with DDP, or load the same checkpoint on all ranks"
        )
