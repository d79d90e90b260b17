"""All inputs of a fit, computed once and cached, in as few passes over the data as possible.

The workbench runs the collectives and the resumable passes; a method's `fit` reads data only through it, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from bmoe_lightning.curvature.gradient_share import GradientShare
from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.experts import ClassLogits, squared_distances
from bmoe_lightning.experts.counted_batch import lockstep
from bmoe_lightning.experts.data_record import DataRecord
from bmoe_lightning.laplace.covariance_cache import CovarianceCache
from bmoe_lightning.laplace.posterior import LaplacePosterior, posterior_terms
from bmoe_lightning.laplace.prior import Scope, check_distances, fit_evidence
from bmoe_lightning.laplace.validation_cache import CacheBuilder
from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.curvature_passes import CurvaturePasses
from bmoe_lightning.methods.data_differences import Split, iterates_once
from bmoe_lightning.methods.given_data import GivenData
from bmoe_lightning.methods.held_out_passes import HeldOutPasses
from bmoe_lightning.methods.router_training import RouterPasses
from bmoe_lightning.methods.temperature_search import check_labelled
from bmoe_lightning.methods.training_covariances import training_terms
from bmoe_lightning.methods.training_data import PassFiles, TrainingData
from bmoe_lightning.routers.types import Router
from bmoe_lightning.utils.distributed import broadcast_, failing_together, num_processes
from bmoe_lightning.utils.fit_warnings import collected_fit_warnings, warn_of_fit
from bmoe_lightning.utils.random_state import unchanged_random_state

PriorMeanName = Literal["pretrained", "zero"]
PRIOR_MEANS: tuple[PriorMeanName, ...] = ("pretrained", "zero")


class Workbench:
    """All inputs of a fit: model, data, curvatures and prior mean.

    Args:
        model: The trained model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        methods: Methods to fit; they share one pass over each data set.
        training: Training data, for curvature.
        calibration: Held-out data, for methods that need them; iterated over at most once.
        prior_mean: Weights from before fine-tuning by qualified parameter name (see `down_proj_weights`).
        snapshots: Snapshots of the trained weights after the last epochs, latest last.
        posteriors: Curvatures that are already collected, by digest.
        shares: Shares of the trained weights' gradient that they cover, by digest.
        calibration_logits: Logits and labels of the held-out data of the existing fit, with which the given ones are
            compared; without `calibration` they are used in their place, except for covariances.
        training_record: Record of the training data of the existing fit, with which the given ones are compared.
        trained: The parameters that were trained; by default those that require gradients.
        seed: Seed for sampled labels, sketch matrices and Monte Carlo noise.
        distributed: Whether all ranks of torch.distributed's default group take part, each with its shard of the data.
        pass_files: Location of the checkpoints of curvature passes; None writes none.
        is_checked: Whether the held-out data are known to be what is needed; see `GivenData`.

    Attributes:
        given: The data, compared with those of the existing fit.
        router_passes: Passes over the training data that train Bayesian routers.
    """

    def __init__(
        self,
        model: nn.Module,
        class_logits: ClassLogits,
        methods: Sequence[Method],
        training: TrainingData,
        calibration: Iterable[Any] | None,
        *,
        prior_mean: Mapping[str, Tensor] | None = None,
        snapshots: Sequence[Path] = (),
        posteriors: Mapping[str, LaplacePosterior] | None = None,
        shares: Mapping[str, GradientShare] | None = None,
        calibration_logits: Split | None = None,
        training_record: DataRecord | None = None,
        trained: Sequence[nn.Parameter] | None = None,
        seed: int = 0,
        distributed: bool = False,
        pass_files: PassFiles | None = None,
        is_checked: bool = False,
    ) -> None:
        self.model = model
        self.snapshots = tuple(snapshots)
        self.seed = seed
        self._class_logits = class_logits
        self._methods = tuple(methods)
        self._training = training
        self._calibration = calibration
        self._prior_mean = prior_mean
        self._distributed = distributed
        self._caches: dict[tuple[str, int], _Cached] = {}
        self._training_caches: dict[tuple[str, int], dict[int, _Cached]] = {}
        self.given = GivenData(
            model,
            class_logits,
            training,
            calibration,
            calibration_logits,
            training_record,
            distributed=distributed,
            is_checked=is_checked,
        )
        self._held_out_passes = HeldOutPasses(model, class_logits, calibration, distributed=distributed, seed=seed)
        data = training, self.held_out_log_probs
        self.router_passes = RouterPasses(model, class_logits, *data, seed=seed, distributed=distributed)
        self._curvature_passes = CurvaturePasses(
            model,
            class_logits,
            [curvature for method in self._methods for curvature in method.curvatures],
            training,
            self.given,
            posteriors=posteriors,
            shares=shares,
            trained=trained,
            seed=seed,
            distributed=distributed,
            pass_files=pass_files,
        )
        needs_covariances = any(method.calibration_curvatures for method in self._methods)
        self._logits = None if needs_covariances or calibration is not None else calibration_logits
        self._distances: dict[tuple[str, str], list[Tensor]] = {}

    @property
    def posteriors(self) -> dict[str, LaplacePosterior]:
        """The posteriors at prior precision 1, by the curvature's digest, as far as they are collected."""
        return self._curvature_passes.posteriors

    @property
    def shares(self) -> dict[str, GradientShare]:
        """Shares of the trained weights' gradient that the curvatures cover, by digest, as far as they are known."""
        return self._curvature_passes.shares

    def check_before_passes(self) -> None:
        """Check everything that can be checked before the first pass over data.

        Raises:
            ValueError: If a curvature's layers do not exist, held-out data, enough of them or their labels are missing,
                or the prior mean is, or the weights equal it, or an existing curvature has no share of the gradient
                that a method uses.
        """
        needing = [method.name for method in self._methods if method.needs.calibration]
        if needing and self._calibration is None and self._logits is None:
            raise ValueError(f"{needing} are fitted on held-out data, and there is no calibration split; pass one")
        for method in self._methods:
            for curvature in method.curvatures:
                curvature.find_layers(self.model)
            if method.needs.prior_mean:
                for curvature in method.curvatures:
                    check_distances(self.squared_distances(curvature, "pretrained"))
            if method.needs.gradient_share:
                for curvature in method.curvatures:
                    self._curvature_passes.check_share(method, curvature)
            if method.needs.routers:
                self._held_out_passes.check()
        self.given.check_needs(self._methods)

    def check_given_data(self, methods: Sequence[Method]) -> None:
        """Compare the data with those of the existing fit, as far as that is possible before the passes over them.

        Args:
            methods: All methods of the table, also those that are already fitted; data that they do not use are not
                looked at.

        Raises:
            DataMismatchError: If the data differ.
        """
        collected = [curvature for method in methods for curvature in method.curvatures if curvature.collects]
        passes = {curvature.max_batches for curvature in collected if self._curvature_passes.is_missing(curvature)}
        has_curvature = any(posterior.factors.rank for posterior in self.posteriors.values())
        if collected and (has_curvature or self.given.training_record is not None):
            self.given.check_training(passes)
        if any(method.needs.calibration for method in methods):
            passed_over = any(method.needs.calibration for method in self._methods)
            self.given.check_calibration(passed_over=passed_over, collects=bool(passes))

    def posterior(self, curvature: Curvature) -> LaplacePosterior:
        """The posterior of a curvature at prior precision 1; see `CurvaturePasses`.

        Raises:
            ValueError: If the data are empty or the model has no such layers; see `collect_factors`.
        """
        return self._curvature_passes.posterior(curvature)

    def layer_names(self, curvature: Curvature) -> Sequence[str]:
        """The names of the layers of a curvature, in their order, for messages.

        Args:
            curvature: Specification.
        """
        return self.posterior(curvature).factors.names

    def calibration_logits(self) -> Split:
        """Logits `[N, K]` float64 and labels `[N]` int64 (or None) of the held-out data, on the CPU.

        Raises:
            ValueError: If there are no held-out data.
            DataMismatchError: If they are others than those of the existing fit.
        """
        if self._logits is None:
            self._pass_over_calibration()
        assert self._logits is not None
        return self._logits

    def labelled_logits(self) -> tuple[Tensor, Tensor]:
        """Logits `[N, K]` and checked labels `[N]` of the held-out data; see `calibration_logits`.

        Raises:
            ValueError: If there are no held-out data, no labels, or a label of an absent class.
        """
        logits, labels = self.calibration_logits()
        if labels is None:
            raise ValueError(
                "held-out labels are needed, but class_logits returned None for them; return (logits, labels)"
            )
        return check_labelled(logits, labels)

    def covariances(self, curvature: Curvature) -> CovarianceCache:
        """Covariance terms of the held-out data under a curvature, for any prior precision.

        Raises:
            ValueError: If there are no held-out data, or no method names this curvature in `curvatures`.
        """
        self.calibration_logits()
        if _key(curvature) not in self._caches:
            raise ValueError(
                "the pass over the held-out data did not include this curvature; a method that uses its covariances "
                "must name it in `calibration_curvatures` and held-out data in `needs`"
            )
        cached = self._caches[_key(curvature)]
        for sentence in cached.doubts:
            warn_of_fit(sentence)
        return cached.cache

    def held_out_log_probs(
        self, candidates: Callable[[BatchView], Tensor], *, key: Hashable = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[G, N, K]` under candidates for a fitted number, and labels; see `HeldOutPasses`.

        A further pass over the held-out data for each call, or for each key.

        Raises:
            ValueError: If there are no held-out data, no labels, or a label of an absent class.
        """
        self.labelled_logits()  # which compares the data with those of the existing fit, and checks labels
        return self._held_out_passes.log_probs(candidates, key=key)

    def routers(self) -> list[Router]:
        """The routers of the model, probed on the first held-out batch; see `HeldOutPasses`."""
        return self._held_out_passes.routers()

    def router_gaps(self) -> Tensor:
        """The median gap of each router between the K-th and the next largest logit, `[L]`, from one further pass."""
        return self._held_out_passes.router_gaps()

    def on_first_batch(self, measure: Callable[[BatchView], int]) -> int:
        """What a function finds on the first held-out batch; see `HeldOutPasses`."""
        return self._held_out_passes.on_first_batch(measure)

    def share(self, curvature: Curvature) -> GradientShare:
        """The share of the trained weights' gradient that a curvature covers; its `reason` says why it is unknown."""
        return self._curvature_passes.share(curvature)

    def training_covariances(self, curvature: Curvature, num_inputs: int) -> CovarianceCache:
        """Covariance terms of the first training examples under a curvature, for any prior precision, with labels.

        It takes a pass over as many whole batches as it takes to have them: a forward and K - 1 backward passes each,
        K the number of classes. A collective, if distributed.

        Args:
            curvature: The curvature.
            num_inputs: Number of training examples of all ranks; more to the end of a batch, and at most all.

        Raises:
            ValueError: If the data can be iterated over only once, are empty or have no labels.
        """
        caches = self._training_caches.setdefault(_key(curvature), {})
        if num_inputs not in caches:
            posterior = self.posterior(curvature)
            if iterates_once(self._training):
                raise ValueError(
                    "a method takes a further pass over the training data, which can be iterated over only once; pass "
                    "a list of batches or a loader"
                )
            with collected_fit_warnings() as doubts:
                cache = training_terms(
                    posterior,
                    self.model,
                    self._class_logits,
                    self._training.batches(curvature.max_batches),
                    num_inputs,
                    max_bytes=curvature.cache_bytes,
                    distributed=self._distributed,
                )
            caches[num_inputs] = _Cached(cache, tuple(doubts))
        for sentence in caches[num_inputs].doubts:
            warn_of_fit(sentence)
        return caches[num_inputs].cache

    def limited_terms(self, method: Method) -> dict[str, int]:
        """The memory in bytes of the covariance terms that are not exact, for want of it, by the curvature's digest."""
        keys = {c: _key(c) for c in method.curvatures}
        found = {c: self._caches[keys[c]] for c in method.calibration_curvatures if keys[c] in self._caches}
        limited = [c for c, cached in found.items() if not cached.cache.is_exact]
        limited += [c for c, key in keys.items() if key in self._training_caches and not self._is_exact(key)]
        return {c.digest: c.cache_bytes for c in limited}

    def squared_distances(self, curvature: Curvature, prior_mean: PriorMeanName) -> list[Tensor]:
        """Squared distances `||W_e - M_e||^2` for each layer of a posterior, `[E]` float64 on the CPU.

        Raises:
            ValueError: If the prior mean is `pretrained` and the weights from before fine-tuning are unknown.
        """
        key = (curvature.digest, prior_mean)
        if key not in self._distances:
            reference = None if prior_mean == "zero" else self._pretrained()
            found = squared_distances(self.model, curvature.posterior_layers(self.model), reference)
            if self._distributed:
                # Randomly initialised weights differ between ranks, and DDP starts training at those of rank 0.
                broadcast_(found)
            self._distances[key] = found
        return self._distances[key]

    def evidence_precision(self, curvature: Curvature, scope: Scope, prior_mean: PriorMeanName) -> Tensor:
        """The prior precision that maximises the evidence: `[L]` float64; see `fit_evidence`."""
        distances = self.squared_distances(curvature, prior_mean)
        posterior = self.posterior(curvature)
        return fit_evidence(posterior.curvature, distances, scope, names=posterior.factors.names)

    def warn(self, sentence: str) -> None:
        """Warn that the number being fitted is doubtful (at a bound, say): logged, and a footnote of the results.

        Args:
            sentence: What was found and what to do, in one sentence.
        """
        warn_of_fit(sentence, stacklevel=2)

    def _pretrained(self) -> dict[str, Tensor]:
        if self._prior_mean is None:
            raise ValueError(
                "the evidence measures how far fine-tuning moved the weights, so it needs the weights from before; "
                "pass prior_mean={parameter name: tensor}, or use prior_mean='zero'"
            )
        return dict(self._prior_mean)

    def _is_exact(self, key: tuple[str, int]) -> bool:
        return all(cached.cache.is_exact for cached in self._training_caches[key].values())

    def _pass_over_calibration(self) -> None:
        """One pass for all methods: logits, labels and the covariance terms under every curvature."""
        if self._calibration is None:
            raise ValueError(
                "a method uses held-out data, and there are none; declare them in `needs`, and pass a calibration split"
            )
        collected = [c for method in self._methods for c in method.calibration_curvatures]
        posteriors = {curvature.digest: self.posterior(curvature) for curvature in collected}
        shards = num_processes() if self._distributed else 1
        # Each has its own memory, so that a method is fitted to the same terms whatever else is in the table.
        builders = {
            (digest, max_bytes): CacheBuilder(posteriors[digest].curvature, max_bytes=max_bytes, num_shards=shards)
            for digest, max_bytes in dict.fromkeys(_key(curvature) for curvature in collected)
        }
        if not builders:
            self._logits = self.given.plain_split()
            return
        # A loader that shuffles gives further passes over the data, which start from the same state, the same order.
        with unchanged_random_state(self._calibration), failing_together(distributed=self._distributed):
            for batch in lockstep(self.model, self._calibration):
                found = posterior_terms(list(posteriors.values()), self.model, self._class_logits, batch)
                terms = dict(zip(posteriors, found, strict=True))
                for (digest, _), builder in builders.items():
                    builder.add(terms[digest])
        for key, builder in builders.items():
            with collected_fit_warnings() as doubts:
                cache = builder.finish(distributed=self._distributed)
            self._caches[key] = _Cached(cache, tuple(doubts))
        self._logits = self.given.seen_split(next(iter(self._caches.values())).cache.all_examples())


@dataclass(frozen=True)
class _Cached:
    """Covariance terms, and what makes a fit to them doubtful."""

    cache: CovarianceCache
    doubts: tuple[str, ...]


def _key(curvature: Curvature) -> tuple[str, int]:
    """What covariance terms depend on: the factors and the memory."""
    return curvature.digest, curvature.cache_bytes
