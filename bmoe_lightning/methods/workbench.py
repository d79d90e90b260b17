"""From a trained model to fitted methods: curvature, posterior, prior precisions, temperatures. Plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.kfac import collect_factors
from bmoe_lightning.experts import (
    ClassLogits,
    ExpertLayer,
    squared_distances,
    weight_fingerprint,
)
from bmoe_lightning.experts.counted_batch import count_of, lockstep, plain_batch
from bmoe_lightning.experts.fsdp import check_collective
from bmoe_lightning.laplace.posterior import LaplacePosterior, WeightMismatchError
from bmoe_lightning.laplace.predictive import (
    class_probabilities,
    mean_variance,
    temperature_from_variances,
)
from bmoe_lightning.laplace.prior import ValidationCache, fit_lpo
from bmoe_lightning.methods import (
    MAP,
    CheckpointEnsemble,
    DeepEnsemble,
    EvidenceTemperature,
    LaplaceMethod,
    LaplaceTemperature,
    MCDropout,
    Method,
    ShrunkTemperature,
    TemperatureScaling,
    fit_shrunk_temperature,
    fit_temperature,
)
from bmoe_lightning.methods.method import BatchView
from bmoe_lightning.methods.options import NEEDS_CALIBRATION, FitSettings, FittedState
from bmoe_lightning.utils.distributed import broadcast_, gather_examples, num_processes, sum_over_processes


@dataclass(frozen=True)
class Fitted:
    """Fitted state with its curvature.

    Attributes:
        state: the numbers.
        posterior: the curvature, its prior precision from LPO, else from the evidence; None if no method needs it.
        fingerprint: of the weights that all this was fitted on.
        settings: that it was fitted with, as plain values; empty if that is not known.
    """

    state: FittedState = field(default_factory=FittedState)
    posterior: LaplacePosterior | None = None
    fingerprint: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def check_weights(self, model: nn.Module, settings: FitSettings) -> None:
        """Compare a model's weights with those that this was fitted on.

        Raises:
            WeightMismatchError: if they differ.
        """
        if self.posterior is not None:
            self.posterior.check_weights(model)
        elif self.fingerprint and weight_fingerprint(model, settings.find_layers(model)) != self.fingerprint:
            raise WeightMismatchError(
                "the temperatures were fitted on other weights than the model has; load the checkpoint they were "
                "fitted on, or fit them again"
            )

    def scalars(self) -> dict[str, float]:
        """Flat numbers for a logger: what was fitted, and how much of the curvature the factors hold."""
        flat = self.state.scalars()
        if self.posterior is not None:
            layers = self.posterior.factors.layers
            slots = torch.cat([layer.slots.cpu() for layer in layers])
            discarded = torch.cat([layer.discarded_energy() for layer in layers])[slots > 0]
            flat["curvature/slots_per_expert_min"] = float(slots.min())
            flat["curvature/slots_per_expert_mean"] = float(slots.mean())
            flat["curvature/idle_experts"] = float((slots == 0).sum())
            flat["curvature/discarded_energy"] = float(discarded.mean()) if len(discarded) else 0.0
        return flat


def fit(
    model: nn.Module,
    class_logits: ClassLogits,
    settings: FitSettings,
    curvature_batches: Iterable[Any],
    calibration_batches: Iterable[Any] | None,
    *,
    prior_mean: Mapping[str, Tensor] | None = None,
    num_examples: int | None = None,
    distributed: bool = False,
    curvature_checkpoint: str | Path | None = None,
    curvature_checkpoint_every: int = 100,
) -> Fitted:
    """Fit everything that the methods asked for need: one pass over the curvature data, one over the calibration split.

    Args:
        model: the trained model.
        class_logits: `(model, batch) -> (logits [B, K], labels [B] or None)`.
        settings: which methods, and how.
        curvature_batches: training data; looked at only if a method needs a posterior.
        calibration_batches: held-out data; looked at only if a method needs it.
        prior_mean: weights before fine-tuning by qualified parameter name (see `down_proj_weights`), needed for an
            evidence with `prior_mean="pretrained"`.
        num_examples: examples that the curvature shall stand for, if `curvature_batches` is a part of the data.
        distributed: whether all processes of torch.distributed's group call this, each with its share of the data:
            examples r, r + W, r + 2 W, ... for process r of W, and, where weights are sharded, in as many batches of
            the same sizes (see `CountedBatch`). All get the same result, which is that of one process
            with all the data, to rounding. Otherwise nothing is exchanged, however many processes there are.
        curvature_checkpoint: file for the running sums of the curvature, so that a killed pass goes on; see
            `collect_factors`. To be removed with `remove_checkpoint` once the posterior is written.
        curvature_checkpoint_every: batches from one write to the next.

    Raises:
        ValueError: if data, labels or the prior mean are missing, `skip_layers` names every layer or one that the
            model lacks, processes have different weights, or the checkpoint of the curvature is not one of this fit.
        OSError: if that checkpoint cannot be written.
    """
    if settings.needs_calibration and calibration_batches is None:
        needy = sorted(NEEDS_CALIBRATION & set(settings.methods))
        raise ValueError(f"{needy} are fitted on held-out data, and there is no calibration split")
    check_collective(model, distributed=distributed)
    layers = settings.find_layers(model)
    record: dict[str, Any] = {"fingerprint": weight_fingerprint(model, layers), "settings": asdict(settings)}
    if distributed:
        _check_same(record["fingerprint"])
    posterior, state = None, FittedState()
    if settings.needs_posterior:
        posterior = _curvature(
            model,
            class_logits,
            settings,
            layers,
            curvature_batches,
            prior_mean=prior_mean,
            num_examples=num_examples,
            distributed=distributed,
            checkpoint=curvature_checkpoint,
            checkpoint_every=curvature_checkpoint_every,
        )
        state = _calibrate(model, class_logits, settings, posterior, calibration_batches or [], distributed=distributed)
    elif settings.needs_labels:
        logits, labels = plain_logits(model, class_logits, calibration_batches or [], distributed=distributed)
        state = replace(state, temperature=fit_temperature(logits, labels))
    if distributed:
        state = _of_first(state)
    precision = state.evidence_precision if state.lpo_precision is None else state.lpo_precision
    if posterior is not None and precision is not None:
        posterior = posterior.with_prior_precision(torch.tensor(precision, dtype=torch.float64))
    return Fitted(state, posterior, **record)


def _curvature(
    model: nn.Module,
    class_logits: ClassLogits,
    settings: FitSettings,
    layers: list[ExpertLayer],
    batches: Iterable[Any],
    *,
    prior_mean: Mapping[str, Tensor] | None,
    num_examples: int | None,
    distributed: bool,
    checkpoint: str | Path | None,
    checkpoint_every: int,
) -> LaplacePosterior:
    """The posterior, at the prior precision from the evidence where a method needs that."""
    kept = _kept_layers(settings, layers)
    reference = _reference(settings, prior_mean) if settings.needs_evidence else None
    factors = collect_factors(
        model,
        class_logits,
        batches,
        rank=settings.rank,
        fisher=settings.fisher,
        approximation=settings.approximation,
        sketch=settings.sketch,
        layers=layers,
        num_examples=num_examples,
        seed=settings.seed,
        distributed=distributed,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        device="cpu" if settings.offload_factors else None,
    )
    if settings.factor_dtype == "bfloat16":
        factors = factors.to(dtype=torch.bfloat16)
    posterior = LaplacePosterior(factors, prior_mean=settings.prior_mean, offload=settings.offload_factors)
    if settings.skip_layers:
        posterior = posterior.without_layers(settings.skip_layers)
    if not settings.needs_evidence:
        return posterior
    distances = squared_distances(model, kept, reference)
    if distributed:
        # A module that starts at random starts elsewhere on each process, and training at the first one's weights.
        broadcast_(distances)
    return posterior.fit_prior_evidence(distances, settings.evidence_scope)


def _calibrate(
    model: nn.Module,
    class_logits: ClassLogits,
    settings: FitSettings,
    posterior: LaplacePosterior,
    batches: Iterable[Any],
    *,
    distributed: bool,
) -> FittedState:
    """All numbers, from one pass over the calibration split."""
    state = FittedState()
    if settings.needs_evidence:
        state = replace(state, evidence_precision=tuple(posterior.prior_precision.tolist()))
    if settings.needs_labels:
        cache = posterior.validation_cache(model, class_logits, batches, distributed=distributed)
        return _fit_on_cache(settings, state, cache)
    if settings.evidence_temperatures:
        temperature = posterior.evidence_temperature(model, class_logits, batches, distributed=distributed)
        return replace(state, evidence_temperature=temperature)
    return state


def _kept_layers(settings: FitSettings, layers: list[ExpertLayer]) -> list[ExpertLayer]:
    unknown = set(settings.skip_layers) - {layer.index for layer in layers}
    if unknown:
        raise ValueError(f"skip_layers names {sorted(unknown)}, but the model has {len(layers)} expert layers")
    kept = [layer for layer in layers if layer.index not in settings.skip_layers]
    if not kept:
        raise ValueError(f"skip_layers names all {len(layers)} expert layers, which leaves no posterior")
    return kept


def _reference(settings: FitSettings, prior_mean: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    if settings.prior_mean == "zero":
        return None
    if prior_mean is None:
        raise ValueError(
            "the evidence measures how far fine-tuning moved the experts, so it needs the weights from before: pass "
            "prior_mean={parameter name: tensor}, or use prior_mean='zero'"
        )
    return dict(prior_mean)


def _fit_on_cache(settings: FitSettings, state: FittedState, cache: ValidationCache) -> FittedState:
    """Fit all that the calibration split decides, from its one pass."""
    wanted = set(settings.methods)
    if "temperature" in wanted:
        state = replace(state, temperature=fit_temperature(cache.logits, cache.labels))
    if "laplace_lpo" in wanted:
        precision = fit_lpo(cache, settings.lpo_scope, seed=settings.seed)
        state = replace(state, lpo_precision=tuple(precision.tolist()))
    if not settings.needs_evidence:
        return state
    covariance = cache.covariance(torch.tensor(state.evidence_precision, dtype=torch.float64))
    if settings.evidence_temperatures:
        temperature = temperature_from_variances(mean_variance(cache.logits, covariance))
        state = replace(state, evidence_temperature=temperature)
        if "shrunk_temperature" in wanted:
            shrunk = fit_shrunk_temperature(cache.logits, cache.labels, temperature)
            state = replace(state, shrunk_temperature=shrunk)
    if "laplace_temperature" in wanted:
        log_probs = class_probabilities(
            cache.logits, covariance, settings.link, num_samples=settings.num_samples, seed=settings.seed
        )
        state = replace(state, laplace_temperature=fit_temperature(log_probs, cache.labels))
    return state


def plain_logits(
    model: nn.Module, class_logits: ClassLogits, batches: Iterable[Any], *, distributed: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits `[N, K]` float64 and labels `[N]` of a labelled data set, on the CPU.

    Args:
        model: the model.
        class_logits: `(model, batch) -> (logits [B, K], labels [B])`.
        batches: the data set, or this process's share of it.
        distributed: whether all processes call this, each with its share (see `gather_examples`).

    Raises:
        ValueError: if there is no example or no label.
    """
    all_logits, all_labels = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.int64)]
    for batch in lockstep(model, batches):
        view = BatchView(model, class_logits, plain_batch(batch))
        if view.labels is None:
            raise ValueError("temperatures are fitted on labels, but class_logits returned None for them")
        num_counted = count_of(batch, len(view.logits))
        all_logits.append(view.logits[:num_counted].cpu())
        all_labels.append(view.labels[:num_counted].cpu())
    # An empty tensor of one dimension goes with tensors of any shape.
    logits, labels = torch.cat(all_logits), torch.cat(all_labels)
    if distributed:
        logits, labels = gather_examples(logits), gather_examples(labels)
    if not len(labels):
        raise ValueError("no calibration example: the calibration split is empty")
    return logits, labels


def _check_same(fingerprint: str) -> None:
    """Refuse weights that differ between processes: there is no one posterior of them."""
    own = torch.frombuffer(bytearray.fromhex(fingerprint), dtype=torch.uint8).long()
    first = own.clone()
    broadcast_([first])
    differing = torch.tensor([int(not torch.equal(own, first))])
    sum_over_processes([differing])
    if int(differing):
        raise ValueError(
            f"the model's weights on {int(differing)} of {num_processes()} processes differ from those on the first, "
            "so there is no one posterior of them; fit after training with DDP, or load the same checkpoint on all"
        )


def _of_first(state: FittedState) -> FittedState:
    """The first process's numbers, bit for bit."""
    numbers = {name: torch.tensor(v, dtype=torch.float64) for name, v in asdict(state).items() if v is not None}
    broadcast_(list(numbers.values()))
    return FittedState.from_mapping({name: values.tolist() for name, values in numbers.items()})


def build_methods(
    model: nn.Module,
    settings: FitSettings,
    fitted: Fitted,
    *,
    snapshots: Sequence[str | Path] = (),
    ensemble_members: Sequence[str | Path] = (),
) -> list[Method]:
    """Make the methods that settings ask for, from what was fitted.

    Args:
        model: the model, for MC dropout's expert layers.
        settings: which methods, and how they predict.
        fitted: from `fit`.
        snapshots: files of the checkpoint ensemble.
        ensemble_members: files of the deep ensemble, beside the model's own weights.

    Raises:
        ValueError: if a method lacks what it needs.
    """
    makers = _makers(model, settings, fitted, snapshots, ensemble_members)
    return [makers[name]() for name in settings.methods]


def _makers(
    model: nn.Module,
    settings: FitSettings,
    fitted: Fitted,
    snapshots: Sequence[str | Path],
    ensemble_members: Sequence[str | Path],
) -> dict[str, Callable[[], Method]]:
    state = fitted.state

    def laplace(name: str, label: str, precision: tuple[float, ...] | None) -> Method:
        return LaplaceMethod(
            _posterior(fitted, name, precision),
            name=name,
            label=label,
            link=settings.link,
            num_samples=settings.num_samples,
            seed=settings.seed,
        )

    return {
        "map": MAP,
        "mc_dropout": lambda: MCDropout(
            settings.find_layers(model), p=settings.dropout, num_samples=settings.dropout_samples, seed=settings.seed
        ),
        "checkpoint_ensemble": lambda: CheckpointEnsemble(snapshots),
        "deep_ensemble": lambda: DeepEnsemble(ensemble_members),
        "temperature": lambda: TemperatureScaling(_fitted_value(state.temperature, "temperature")),
        "laplace_evidence": lambda: laplace("laplace_evidence", "Bayesian-MoE (evidence)", state.evidence_precision),
        "laplace_lpo": lambda: laplace("laplace_lpo", "Bayesian-MoE (LPO)", state.lpo_precision),
        "laplace_temperature": lambda: LaplaceTemperature(
            _posterior(fitted, "laplace_temperature", state.evidence_precision),
            _fitted_value(state.laplace_temperature, "laplace_temperature"),
            link=settings.link,
            num_samples=settings.num_samples,
            seed=settings.seed,
        ),
        "evidence_temperature": lambda: EvidenceTemperature(
            _fitted_value(state.evidence_temperature, "evidence_temperature")
        ),
        "shrunk_temperature": lambda: ShrunkTemperature(_fitted_value(state.shrunk_temperature, "shrunk_temperature")),
    }


def _fitted_value(value: float | None, name: str) -> float:
    if value is None:
        raise ValueError(f"{name} has not been fitted; fit again with this method among `methods`")
    return value


def _posterior(fitted: Fitted, name: str, precision: tuple[float, ...] | None) -> LaplacePosterior:
    if fitted.posterior is None or precision is None:
        raise ValueError(f"{name} has not been fitted; fit again with this method among `methods`")
    return fitted.posterior.with_prior_precision(torch.tensor(precision, dtype=torch.float64))
