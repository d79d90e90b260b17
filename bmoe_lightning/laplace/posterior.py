"""The posterior: a low-rank Kronecker-factored Gaussian over the `down_proj` weights of every expert.

See Daxberger et al. 2021, Laplace Redux (https://arxiv.org/abs/2106.14806). With the eigenvalues
`s_qp = n_e gamma_q alpha_p` of an expert's curvature and `u_qp = u_q kron u_p`,

    precision   = lambda I + sum_qp s_qp u_qp u_qp^T
    covariance  = 1/lambda I - sum_qp s_qp / (lambda (lambda + s_qp)) u_qp u_qp^T
    log det     = d_in d_out log lambda + sum_qp log(1 + s_qp / lambda).

The posterior of an expert without routed tokens is its prior: variance 1/lambda in every direction.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.factors import KroneckerFactors
from bmoe_lightning.curvature.spec import CACHE_BYTES
from bmoe_lightning.curvature.texts import SequenceLogProb
from bmoe_lightning.experts.counted_batch import lockstep
from bmoe_lightning.experts.discovery import locate_expert_layers
from bmoe_lightning.experts.fsdp import reshard, runs_in_lockstep
from bmoe_lightning.experts.logits_contract import ClassLogits
from bmoe_lightning.experts.threads import model_lock
from bmoe_lightning.experts.weight_comparison import same_weights
from bmoe_lightning.laplace.attribution import Attribution, attributed
from bmoe_lightning.laplace.binding import Binding
from bmoe_lightning.laplace.covariance import BatchTerms, covariance
from bmoe_lightning.laplace.covariance_cache import CovarianceCache
from bmoe_lightning.laplace.predictive import (
    NUM_SAMPLES,
    LinkName,
    Prediction,
    class_probabilities,
    predict_with_uncertainty,
)
from bmoe_lightning.laplace.prior import Scope, fit_evidence, fit_lpo, log_evidence_penalty
from bmoe_lightning.laplace.sequences import SequenceVariance, text_variance
from bmoe_lightning.laplace.shared_terms import shared_terms
from bmoe_lightning.laplace.storage import load_posterior, save_posterior
from bmoe_lightning.laplace.validation_cache import cache_terms
from bmoe_lightning.utils.distributed import failing_together, is_rank_zero

_logger = logging.getLogger(__name__)


class WeightMismatchError(RuntimeError):
    """The model has other weights than those that the posterior was fitted to."""


class LaplacePosterior:
    """A Laplace posterior over the second linear layers of all experts.

    Args:
        factors: Curvature from `collect_factors`.
        prior_precision: Prior precision lambda: a number, a tensor `[L]` with one value per layer, or a mapping from
            layer names.
        prior_mean: Prior mean of the evidence, `"pretrained"` or `"zero"`; metadata only.
        offload: Whether the factors are offloaded to the CPU, and the bases of a layer are copied to its device only
            while they are used. Otherwise a copy remains on the device after the first prediction.

    Attributes:
        factors: The curvature.
        prior_precision: Prior precision `[L]` float64 on the CPU.
        curvature: Eigenvalues `s_qp` of each layer's curvature, `[E, r_g, r_a]` float64 on the CPU.

    Raises:
        ValueError: If a precision is not positive and finite, or their number differs from that of the layers.
    """

    def __init__(
        self,
        factors: KroneckerFactors,
        prior_precision: float | Tensor | Mapping[str, float] = 1.0,
        *,
        prior_mean: str = "pretrained",
        offload: bool = False,
    ) -> None:
        self.factors = factors.to("cpu") if offload else factors
        self.offload = offload
        self.prior_precision = _precision_tensor(factors, prior_precision)
        self.prior_mean = prior_mean
        self.curvature = [layer.curvature().cpu() for layer in factors.layers]
        self._bound: Binding | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All attributes except the bound model, which another process (a spawned one, say) does not share."""
        return vars(self) | {"_bound": None}

    def with_prior_precision(self, prior_precision: float | Tensor | Mapping[str, float]) -> LaplacePosterior:
        """The same curvature under another prior precision; everything else is shared."""
        other = copy.copy(self)
        other.prior_precision = _precision_tensor(self.factors, prior_precision)
        return other

    def without_layers(self, indices: Sequence[int]) -> LaplacePosterior:
        """The posterior with the weights of some expert layers deterministic (the paper's ablation over layers).

        Args:
            indices: Indices of the expert layers to skip.

        Raises:
            ValueError: If an index does not exist or no layer is left.
        """
        kept = [i for i, layer in enumerate(self.factors.layers) if layer.index not in set(indices)]
        factors = self.factors.without(indices)
        return LaplacePosterior(factors, self.prior_precision[kept], prior_mean=self.prior_mean, offload=self.offload)

    def log_det(self) -> Tensor:
        """Log-determinant of the posterior precision over all experts and layers: a float64 scalar."""
        total = torch.zeros((), dtype=torch.float64)
        for layer, s, precision in zip(self.factors.layers, self.curvature, self.prior_precision, strict=True):
            size = layer.num_experts * layer.d_in * layer.d_out
            total = total + size * precision.log() + torch.log1p(s / precision).sum()
        return total

    def log_marginal_likelihood(self, log_likelihood: float, squared_distances: Sequence[Tensor]) -> Tensor:
        """The Laplace evidence `log p(D | lambda)`.

        Args:
            log_likelihood: Log-likelihood `log p(D | W*)`, summed over the `num_examples` of the factors.
            squared_distances: Distances `||W_e - M_e||^2` from the prior mean, `[E]` for each layer.

        Returns:
            A float64 scalar.
        """
        return log_likelihood + log_evidence_penalty(self.curvature, squared_distances, self.prior_precision)

    def fit_prior_evidence(self, squared_distances: Sequence[Tensor], scope: Scope = "layer") -> LaplacePosterior:
        """The posterior at the prior precision that maximises the evidence.

        Args:
            squared_distances: Distances `||W_e - M_e||^2` from the prior mean, `[E]` for each layer.
            scope: Scope of the prior precision: `layer` (one per layer; measured to be better) or `global`.
        """
        found = fit_evidence(self.curvature, squared_distances, scope, names=self.factors.names)
        return self.with_prior_precision(found)

    def fit_prior_lpo(
        self,
        model: nn.Module,
        class_logits: ClassLogits,
        batches: Iterable[Any],
        *,
        scope: Scope = "layer",
        num_samples: int = 1000,
        seed: int = 0,
    ) -> LaplacePosterior:
        """The posterior at the prior precision that minimises the NLL of a validation set (Laplace prior optimisation).

        It takes one pass over the validation set.

        Args:
            model: Model that the curvature was collected on.
            class_logits: Function `(model, batch) -> (logits [B, K], labels [B])`.
            batches: Batches of the validation set.
            scope: Scope of the prior precision: `layer` (one per layer; measured to be better) or `global`.
            num_samples: Number of Monte Carlo samples of the objective.
            seed: Seed for the Monte Carlo noise.

        Raises:
            ValueError: If there are no examples or no labels.
        """
        cache = self.validation_cache(model, class_logits, batches)
        found = fit_lpo(cache, scope, num_samples=num_samples, seed=seed, names=self.factors.names)
        return self.with_prior_precision(found)

    def validation_cache(
        self,
        model: nn.Module,
        class_logits: ClassLogits,
        batches: Iterable[Any],
        *,
        distributed: bool = False,
        max_bytes: int = CACHE_BYTES,
    ) -> CovarianceCache:
        """Cache the terms of a labelled set in one pass, from which predictions follow for any prior precision.

        Args:
            model: Model that the curvature was collected on.
            class_logits: Function `(model, batch) -> (logits [B, K], labels [B])`.
            batches: Batches of the set.
            distributed: Whether all ranks call this, each with its shard of the set (see `gather_examples`); every rank
                then gets the full cache.
            max_bytes: Memory of the terms; with more classes or examples they are compact, see `CacheBuilder`.

        Raises:
            ValueError: If there are no examples or no labels.
        """
        terms = (self.batch_terms(model, class_logits, batch) for batch in lockstep(model, batches))
        with failing_together(distributed=runs_in_lockstep(model)):
            return cache_terms(terms, self.curvature, distributed=distributed, max_bytes=max_bytes)

    def batch_terms(
        self, model: nn.Module, class_logits: ClassLogits, batch: Any, *, centred: bool = True
    ) -> BatchTerms:
        """The terms of a batch's logit covariance that do not depend on the prior precision.

        Posteriors that differ only in their prior precision share them; see `covariance_of`.
        """
        return posterior_terms([self], model, class_logits, batch, centred=centred)[0]

    def covariance_of(self, terms: BatchTerms, prior_precision: Tensor | None = None) -> Tensor:
        """The logit covariance `[B, K, K]` of a batch from its terms.

        Args:
            terms: Terms from `batch_terms`.
            prior_precision: Prior precision `[L]`; by default that of this posterior.
        """
        precision = self.prior_precision if prior_precision is None else prior_precision
        return covariance(terms, self.curvature, precision)

    def logit_covariance(
        self, model: nn.Module, class_logits: ClassLogits, batch: Any, *, centred: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logits and their posterior covariance under the linearised model.

        Args:
            model: Model that the curvature was collected on.
            class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
            batch: Batch that `class_logits` accepts.
            centred: Whether to return the covariance of the centred logits, which have the same softmax, for one
                backward pass less (K - 1 instead of K).

        Returns:
            Logits `[B, K]` and covariance `[B, K, K]`, float64. Absent classes have logit `-inf` and covariance zero.

        Raises:
            WeightMismatchError: If the model's weights are not those that the curvature was collected on.
        """
        with failing_together(distributed=runs_in_lockstep(model)):
            terms = self.batch_terms(model, class_logits, batch, centred=centred)
            return terms.logits, self.covariance_of(terms)

    def predict(
        self,
        model: nn.Module,
        class_logits: ClassLogits,
        batch: Any,
        link: LinkName = "mc",
        *,
        num_samples: int = NUM_SAMPLES,
        seed: int = 0,
    ) -> Tensor:
        """Predictive log-probabilities `[B, K]`, float64.

        Args:
            model: Model that the curvature was collected on.
            class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
            batch: Batch that `class_logits` accepts.
            link: Link: `mc`, `isotropic`, `probit` or `laplace_bridge`.
            num_samples: Number of Monte Carlo samples.
            seed: Seed for the Monte Carlo noise.
        """
        logits, logit_covariance = self.logit_covariance(model, class_logits, batch, centred=True)
        return class_probabilities(logits, logit_covariance, link, num_samples=num_samples, seed=seed)

    def predict_with_uncertainty(
        self, model: nn.Module, class_logits: ClassLogits, batch: Any, *, num_samples: int = NUM_SAMPLES, seed: int = 0
    ) -> Prediction:
        """The `mc` prediction with logit covariance, entropy and mutual information; arguments as in `predict`."""
        logits, logit_covariance = self.logit_covariance(model, class_logits, batch, centred=True)
        return predict_with_uncertainty(logits, logit_covariance, num_samples=num_samples, seed=seed)

    def attribute(self, model: nn.Module, class_logits: ClassLogits, batch: Any) -> Attribution:
        """Split the variance of each prediction by layer and expert; arguments as in `predict`.

        Raises:
            WeightMismatchError: If the model's weights are not those that the curvature was collected on.
        """
        with failing_together(distributed=runs_in_lockstep(model)):
            (terms,) = posterior_terms([self], model, class_logits, batch, by_group=True)
            return attributed(terms, self.factors.layers, self.prior_precision)

    def sequence_variance(self, model: nn.Module, sequence_log_prob: SequenceLogProb, batch: Any) -> SequenceVariance:
        """Mean and variance of `log p(y | x)` of whole texts, from one forward and one backward pass for all of them.

        Args:
            model: Model that the curvature was collected on.
            sequence_log_prob: Function `(model, batch) -> log p(y | x) [B]`, such as
                `bmoe_lightning.models.sequence_log_prob`.
            batch: Batch that it accepts. Several texts may share a row if no token of one depends on another one.

        Raises:
            WeightMismatchError: If the model's weights are not those that the curvature was collected on.
            ValueError: If the function does not return one number for each text.
        """
        return SequenceVariance(*text_variance(self, model, sequence_log_prob, Tensor.detach, batch))

    def check_weights(self, model: nn.Module) -> None:
        """Compare the model's weights with those that the curvature was collected on.

        Raises:
            WeightMismatchError: If they differ.
            ValueError: If the model lacks a layer.
        """
        layers = locate_expert_layers(model, self.factors.expert_layers)
        found = same_weights(model, layers, self.factors.fingerprint, self.factors.weights)
        if not found.same:
            raise WeightMismatchError(
                f"this posterior was fitted to other weights than the model has{found.reason()}. Load the checkpoint "
                "it was fitted to, or refit it (trainer.test() without a model loads the best checkpoint, not the "
                "last)."
            )
        for sentence in found.remarks() if is_rank_zero() else []:
            _logger.warning("%s", sentence)

    def save(self, path: str | Path) -> None:
        """Write factors, prior precision and fingerprint to one safetensors file, atomically.

        Raises:
            OSError: If the file cannot be written; an existing file is unchanged.
        """
        save_posterior(path, self.factors, self.prior_precision, self.prior_mean)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", *, offload: bool = False) -> LaplacePosterior:
        """Load a posterior that `save` wrote.

        Args:
            path: Path of the file.
            device: Device of the factors.
            offload: Whether the factors are offloaded to the CPU; see the class.

        Raises:
            FileNotFoundError: If the file does not exist.
            OSError: If it cannot be read.
            ValueError: If it is not a posterior, is truncated or damaged, or has another version.
        """
        stored = load_posterior(path)
        return cls(stored.factors.to(device), stored.prior_precision, prior_mean=stored.prior_mean, offload=offload)

    def _bind(self, model: nn.Module) -> Binding:
        """Locate the layers in a model, check its weights and move the factors; repeated when the model changed."""
        reshard(model)
        bound = self._bound
        if bound is None or not bound.is_of(model):
            self.check_weights(model)
            bound = Binding.of(model, self.factors, offload=self.offload)
            self._bound = bound
        return bound


def posterior_terms(
    posteriors: Sequence[LaplacePosterior],
    model: nn.Module,
    class_logits: ClassLogits,
    batch: Any,
    *,
    centred: bool = True,
    by_group: bool = False,
) -> list[BatchTerms]:
    """The covariance terms of a batch under several posteriors, from one forward pass.

    The covariance is a sum over layers: layers whose factors several posteriors share (`without_layers`) are computed
    once. A batch that does not fit in memory runs in parts; see `run_in_parts`. A batch of one short example runs as
    copies of it within `copied_examples`.

    Args:
        posteriors: Posteriors over the same or different layers of one model.
        model: The model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        batch: Batch that `class_logits` accepts.
        centred: Whether to centre the logits; see `LaplacePosterior.logit_covariance`.
        by_group: Whether to return the terms that `attributed` needs.

    Raises:
        WeightMismatchError: If the model's weights are not those that a curvature was collected on.
    """
    with model_lock(model):
        bound = [posterior._bind(model) for posterior in posteriors]
        return shared_terms(bound, model, class_logits, batch, centred=centred, by_group=by_group)


def _precision_tensor(factors: KroneckerFactors, value: float | Tensor | Mapping[str, float]) -> Tensor:
    names = [layer.name for layer in factors.layers]
    if isinstance(value, Mapping):
        missing = [name for name in names if name not in value]
        if missing:
            raise ValueError(f"no prior precision for the layers {missing}; add them to the mapping")
        value = torch.tensor([value[name] for name in names], dtype=torch.float64)
    precision = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    if precision.dim() == 0:
        precision = precision.expand(len(names)).clone()
    if precision.shape != (len(names),):
        raise ValueError(f"{len(names)} layers need one prior precision each, got shape {tuple(precision.shape)}")
    if not bool((precision.isfinite() & (precision > 0)).all()):
        raise ValueError(f"prior precisions must be positive and finite, got {precision.tolist()}")
    return precision
