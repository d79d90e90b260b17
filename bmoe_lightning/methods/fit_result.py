"""The result of a fit: the state of every method, and the curvatures they share."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.gradient_share import GradientShare
from bmoe_lightning.curvature.kfac import prior_factors
from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.experts import ExpertLayer
from bmoe_lightning.experts.data_record import DataRecord
from bmoe_lightning.experts.discovery import locate_expert_layers
from bmoe_lightning.experts.weight_comparison import PresentWeights, WeightComparison
from bmoe_lightning.experts.weight_record import WeightRecord
from bmoe_lightning.laplace.posterior import LaplacePosterior, WeightMismatchError
from bmoe_lightning.methods.base import PRIOR_PRECISION, Method, State
from bmoe_lightning.utils.distributed import is_rank_zero

_logger = logging.getLogger(__name__)


class NotFittedError(RuntimeError):
    """A method predicts without having been fitted, or was fitted with other options."""


@dataclass(frozen=True)
class FittedMethod:
    """The fit of one method.

    Attributes:
        state: State from `Method.fit`.
        options: The method's `fit_options` when it was fitted.
        curvatures: Digests of the curvatures that its fit or its predictions use.
        warnings: What makes the fit doubtful, one sentence each; see `warn_of_fit`.
        limited_terms: Memory in bytes with which the covariance terms of the held-out data were compact or those of a
            subset, by the digest of their curvature; none where they were exact.
        file: Path of the file that the state was read from; empty if it was fitted in this process.
        checked_by: Methods that have checked a state from a file, which may be as large as the model.
    """

    state: State
    options: Mapping[str, Any]
    curvatures: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    limited_terms: Mapping[str, int] = field(default_factory=dict)
    file: str = ""
    checked_by: list[Method] = field(default_factory=list, repr=False, compare=False)


@dataclass(frozen=True)
class FitResult:
    """The fit of all methods to one set of weights.

    Attributes:
        fit_id: Identifier in all files of this fit.
        fingerprint: Fingerprint of the weights (see `weight_fingerprint`).
        layers: Layers whose MoE blocks the fingerprint covers.
        methods: Fitted methods by name.
        posteriors: Curvatures at prior precision 1, by the digest of their `Curvature`.
        seed: Seed for the noise of predictions.
        calibration: Logits `[N, K]` float64 and labels `[N]` (or None) of the held-out data, if a method used them.
        weights: Record of the weights, with which renamed, merged or cast ones are recognised.
        warnings: What makes the predictions of every method doubtful, one sentence each.
        training: Record of the training data, if a curvature was collected from them; None in files of an earlier
            version.
        shares: Shares of the trained weights' gradient that the curvatures cover, by digest; none in files of an
            earlier version.
    """

    fit_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    fingerprint: str = ""
    layers: tuple[ExpertLayer, ...] = ()
    methods: Mapping[str, FittedMethod] = field(default_factory=dict)
    posteriors: Mapping[str, LaplacePosterior] = field(default_factory=dict)
    seed: int = 0
    calibration: tuple[Tensor, Tensor | None] | None = None
    weights: WeightRecord | None = field(default=None, repr=False)
    warnings: tuple[str, ...] = ()
    training: DataRecord | None = field(default=None, repr=False)
    shares: Mapping[str, GradientShare] = field(default_factory=dict)

    def differences(self, method: Method) -> list[str]:
        """Fit options of a method that differ from those of the stored fit of that name.

        Returns:
            Phrases such as `scope='layer' (here 'global')`; empty if there is no fit of that name, or an equal one.
        """
        stored = self.methods.get(method.name)
        if stored is None:
            return []
        differing = list(_differences(stored.options, method.fit_options()))
        digests = tuple(curvature.digest for curvature in method.curvatures)
        if not differing and stored.curvatures != digests:
            differing = [f"curvatures={list(stored.curvatures)} (here {list(digests)})"]
        return differing

    def is_fitted(self, method: Method) -> bool:
        """Whether a method can predict with this fit."""
        if not method.is_fitted_method:
            return True
        return method.name in self.methods and not self.differences(method) and not self._missing(method)

    def is_finished(self, method: Method) -> bool:
        """Whether nothing is left to fit: the method can predict, and more memory would not have changed its fit."""
        if not self.is_fitted(method):
            return False
        limits = self.methods[method.name].limited_terms if method.is_fitted_method else {}
        return all(c.cache_bytes <= limits.get(c.digest, c.cache_bytes) for c in method.curvatures)

    def state_of(self, method: Method) -> State:
        """The state of a method.

        Raises:
            NotFittedError: If it has not been fitted, or was fitted with other options.
            ValueError: If it was read from a file, and no fit has such values.
        """
        if not method.is_fitted_method:
            return {}
        if differing := self.differences(method):
            raise NotFittedError(
                f"{method.name} was fitted with other options: {', '.join(differing)}. Pass the same ones, or refit it "
                "with fit_posterior, which does not refit the other methods."
            )
        if not self.is_fitted(method):
            raise NotFittedError(
                f"{method.name} has not been fitted; call fit_posterior, which fits missing methods only"
            )
        stored = self.methods[method.name]
        if stored.file and method not in stored.checked_by:
            self._check_state(method, stored)
            stored.checked_by.append(method)
        return stored.state

    def _check_state(self, method: Method, stored: FittedMethod) -> None:
        try:
            method.check_state(stored.state)
            if PRIOR_PRECISION in stored.state:
                shape = stored.state[PRIOR_PRECISION].shape
                layers = {len(self.posteriors[d].prior_precision) for d in stored.curvatures if d in self.posteriors}
                if layers - {shape[0]}:
                    raise ValueError(f"{PRIOR_PRECISION!r} has shape {tuple(shape)}, and the curvature {layers} layers")
        except ValueError as error:
            raise ValueError(
                f"{stored.file} contains no valid state of {method.name}: {error}. Fit it again."
            ) from error

    def warnings_of(self, method: Method) -> tuple[str, ...]:
        """What makes the predictions of a method doubtful, one sentence each: those on its fit, and on all methods."""
        stored = self.methods.get(method.name)
        own = () if stored is None or not method.is_fitted_method else stored.warnings
        return (*own, *self.warnings)

    def posteriors_for(self, curvatures: Iterable[Curvature], model: nn.Module) -> dict[str, LaplacePosterior]:
        """The posteriors of some curvatures; those of rank 0, which need no pass, are created from the model.

        Raises:
            NotFittedError: If a curvature has not been collected.
        """
        found = {}
        for curvature in curvatures:
            posterior = self.posteriors.get(curvature.digest)
            if posterior is None and not curvature.collects:
                posterior = _prior_only(curvature, model)
            if posterior is None:
                raise NotFittedError(
                    f"the curvature {curvature.description()} has not been collected; call fit_posterior"
                )
            found[curvature.digest] = posterior
        return found

    def has_weights_of(self, model: nn.Module) -> bool:
        """Whether this was fitted to the weights that a model has. A collective, if they are sharded.

        Raises:
            ValueError: If the model lacks a layer.
        """
        return self.compared(PresentWeights(model)).same

    def compared(self, present: PresentWeights) -> WeightComparison:
        """Compare the weights of a model with those that this was fitted to. A collective, if they are sharded.

        Raises:
            ValueError: If the model lacks a layer.
        """
        if not self.fingerprint:
            return WeightComparison(same=True)
        layers = locate_expert_layers(present.model, self.layers)
        return present.compared(layers, self.fingerprint, self.weights)

    def check_weights(self, model: nn.Module) -> None:
        """Compare a model's weights with those that this was fitted to.

        Raises:
            WeightMismatchError: If they differ.
            ValueError: If the model lacks a layer.
        """
        found = self.compared(PresentWeights(model))
        if not found.same:
            raise WeightMismatchError(
                f"the methods were fitted to other weights than the model has{found.reason()}. Load the checkpoint "
                "they were fitted to, or refit them (trainer.test() without a model loads the best checkpoint, not the "
                "last)."
            )
        for sentence in found.remarks() if is_rank_zero() else []:
            _logger.warning("%s", sentence)

    def scalars(self, methods: Iterable[Method]) -> dict[str, float]:
        """Scalars to log: the fitted hyperparameters, and what each curvature's low rank discards, and its `kappa`.

        Args:
            methods: Methods to log; those that are not fitted are skipped. See `Method.hyperparameters`.
        """
        flat: dict[str, float] = {}
        for method in methods:
            if method.name in self.methods:
                numbers = method.hyperparameters(self.methods[method.name].state)
                flat |= {f"posterior/{method.name}/{key}": value for key, value in numbers.items()}
        for position, (digest, posterior) in enumerate(self.posteriors.items()):
            prefix = f"curvature_{position}" if position else "curvature"
            flat |= {f"{prefix}/{key}": value for key, value in curvature_scalars(posterior).items()}
            kappa = self.shares[digest].kappa if digest in self.shares else None
            if kappa is not None and math.isfinite(kappa):
                flat[f"{prefix}/kappa"] = kappa
        return flat

    def served_posterior(self, digest: str) -> LaplacePosterior:
        """The posterior of a curvature at the prior precision of the first method that fitted one, for serving."""
        posterior = self.posteriors[digest]
        for fitted in self.methods.values():
            if digest in fitted.curvatures and PRIOR_PRECISION in fitted.state:
                return posterior.with_prior_precision(fitted.state[PRIOR_PRECISION])
        return posterior

    def with_methods(
        self, methods: Mapping[str, FittedMethod], posteriors: Mapping[str, LaplacePosterior]
    ) -> FitResult:
        """The same fit with more methods and curvatures."""
        return replace(self, methods={**self.methods, **methods}, posteriors={**self.posteriors, **posteriors})

    def _missing(self, method: Method) -> bool:
        return any(c.collects and c.digest not in self.posteriors for c in method.prediction_curvatures)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Phrases for the entries of two nested mappings that differ."""
    for name in sorted(there.keys() | here.keys()):
        one, other = there.get(name), here.get(name)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={one!r} (here {other!r})"


def curvature_scalars(posterior: LaplacePosterior) -> dict[str, float]:
    """Routed tokens per expert, and the fraction of the trace that the low rank discards."""
    layers = posterior.factors.layers
    slots = torch.cat([layer.slots.cpu() for layer in layers])
    discarded = torch.cat([layer.discarded_energy() for layer in layers])[slots > 0]
    return {
        "slots_per_expert_min": float(slots.min()),
        "slots_per_expert_mean": float(slots.mean()),
        "idle_experts": float((slots == 0).sum()),
        "discarded_energy": float(discarded.mean()) if len(discarded) else 0.0,
    }


def _prior_only(curvature: Curvature, model: nn.Module) -> LaplacePosterior:
    """A posterior of rank 0, which equals its prior."""
    return LaplacePosterior(prior_factors(model, curvature.posterior_layers(model)))
