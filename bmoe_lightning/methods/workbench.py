"""All inputs of a fit, computed once and cached, in as few passes over the data as possible.

The workbench runs the collectives and the resumable passes; a method's `fit` reads data only through it, on every rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.kfac import collect_factors, prior_factors
from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.experts import ClassLogits, squared_distances
from bmoe_lightning.experts.counted_batch import count_of, lockstep, plain_batch
from bmoe_lightning.experts.logits_contract import NO_LABEL, checked_labels, joined_logits
from bmoe_lightning.laplace.covariance_cache import CovarianceCache
from bmoe_lightning.laplace.posterior import LaplacePosterior, posterior_terms
from bmoe_lightning.laplace.prior import (
    Scope,
    check_distances,
    fit_evidence,
)
from bmoe_lightning.laplace.validation_cache import CACHE_BYTES, CacheBuilder
from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.temperature_search import check_labelled
from bmoe_lightning.utils.distributed import (
    broadcast_,
    failing_together,
    gather_examples,
    gather_number,
    num_processes,
)
from bmoe_lightning.utils.fit_warnings import warn_of_fit

_logger = logging.getLogger(__name__)

PriorMeanName = Literal["pretrained", "zero"]
PRIOR_MEANS: tuple[PriorMeanName, ...] = ("pretrained", "zero")


@runtime_checkable
class TrainingData(Protocol):
    """The training data of curvature passes."""

    def batches(self, max_batches: int | None) -> Iterable[Any]:
        """Batches of one pass; on each rank at most `max_batches` of its shard."""
        ...

    def num_examples(self, max_batches: int | None, seen: int) -> int:
        """Number of examples that the curvature is scaled to, given the number seen in the pass of all ranks."""
        ...


@dataclass(frozen=True)
class Batches:
    """Training data from any iterable of batches, which is iterated over once per curvature.

    Attributes:
        iterable: The batches.
        size: Number of examples that the curvature is scaled to, if the batches are a subset of the data.
    """

    iterable: Iterable[Any]
    size: int | None = None

    def batches(self, max_batches: int | None) -> Iterable[Any]:
        """The batches, at most `max_batches` of them."""
        return self.iterable if max_batches is None else islice(self.iterable, max_batches)

    def num_examples(self, max_batches: int | None, seen: int) -> int:
        """The given size, or the number seen."""
        return seen if self.size is None else self.size


@dataclass(frozen=True)
class PassFiles:
    """Location of the checkpoints of curvature passes.

    Attributes:
        folder: Folder of the checkpoints.
        every: Number of batches between two checkpoints.
        fit_id: Id of the fit that the passes belong to, so that two fits can share a folder.
    """

    folder: Path
    every: int
    fit_id: str = ""

    def path(self, curvature: Curvature) -> Path:
        """Path of the checkpoint of one curvature."""
        return self.folder / f"{self.stem}{curvature.digest}.safetensors"

    @property
    def stem(self) -> str:
        """What the file names of all curvatures begin with."""
        return f"curvature_state-{self.fit_id[:8]}-" if self.fit_id else "curvature_state-"


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
        calibration_logits: Logits and labels of the held-out data, if already computed; a pass over the data then runs
            only for covariances.
        seed: Seed for sampled labels, sketch matrices and Monte Carlo noise.
        distributed: Whether all ranks of torch.distributed's default group take part, each with its shard of the data.
        pass_files: Location of the checkpoints of curvature passes; None writes none.
        cache_bytes: Memory of the covariance terms of the held-out data under all curvatures; see `CacheBuilder`.
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
        calibration_logits: tuple[Tensor, Tensor | None] | None = None,
        seed: int = 0,
        distributed: bool = False,
        pass_files: PassFiles | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.model = model
        self.snapshots = tuple(snapshots)
        self.seed = seed
        self.posteriors = dict(posteriors or {})
        self._class_logits = class_logits
        self._methods = tuple(methods)
        self._training = training
        self._calibration = calibration
        self._prior_mean = prior_mean
        self._distributed = distributed
        self._pass_files = pass_files
        self._cache_bytes = cache_bytes
        self._caches: dict[str, CovarianceCache] = {}
        needs_covariances = any(method.needs.calibration and method.curvatures for method in self._methods)
        self._logits = None if needs_covariances else calibration_logits
        self._distances: dict[tuple[str, str], list[Tensor]] = {}

    def check_before_passes(self) -> None:
        """Check everything that can be checked before the first pass over data.

        Raises:
            ValueError: If held-out data or the prior mean are missing, or the weights equal the prior mean.
        """
        needing = [method.name for method in self._methods if method.needs.calibration]
        if needing and self._calibration is None and self._logits is None:
            raise ValueError(f"{needing} are fitted on held-out data, and there is no calibration split; pass one")
        for method in self._methods:
            if method.needs.prior_mean:
                for curvature in method.curvatures:
                    check_distances(self.squared_distances(curvature, "pretrained"))

    def posterior(self, curvature: Curvature) -> LaplacePosterior:
        """The posterior of a curvature at prior precision 1, collected in one pass over the training data and cached.

        Raises:
            ValueError: If the data are empty or the model has no such layers; see `collect_factors`.
        """
        if curvature.digest not in self.posteriors:
            self.posteriors[curvature.digest] = self._collected(curvature)
        return self.posteriors[curvature.digest]

    def calibration_logits(self) -> tuple[Tensor, Tensor | None]:
        """Logits `[N, K]` float64 and labels `[N]` int64 (or None) of the held-out data, on the CPU.

        Raises:
            ValueError: If there are no held-out data.
        """
        if self._logits is None:
            self._pass_over_calibration()
        assert self._logits is not None
        return self._logits

    @property
    def known_logits(self) -> tuple[Tensor, Tensor | None] | None:
        """The result of `calibration_logits`, if it was computed; else None."""
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
        if curvature.digest not in self._caches:
            raise ValueError(
                "the pass over the held-out data did not include this curvature; a method that uses its covariances "
                "must name it in `curvatures` and held-out data in `needs`"
            )
        return self._caches[curvature.digest]

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
        return fit_evidence(self.posterior(curvature).curvature, distances, scope)

    def warn(self, sentence: str) -> None:
        """Warn that the number being fitted is doubtful (at a bound, say): logged, and a footnote of the results.

        Args:
            sentence: What was found and what to do, in one sentence.
        """
        warn_of_fit(sentence, stacklevel=2)

    def _pretrained(self) -> dict[str, Tensor]:
        if self._prior_mean is None:
            raise ValueError(
                "the evidence measures how far fine-tuning moved the experts, so it needs the weights from before; "
                "pass prior_mean={parameter name: tensor}, or use prior_mean='zero'"
            )
        return dict(self._prior_mean)

    def _collected(self, curvature: Curvature) -> LaplacePosterior:
        if not curvature.collects:
            factors = prior_factors(self.model, curvature.find_layers(self.model))
        else:
            files = self._pass_files
            factors = collect_factors(
                self.model,
                self._class_logits,
                self._training.batches(curvature.max_batches),
                rank=curvature.rank,
                fisher=curvature.fisher,
                approximation=curvature.approximation,
                sketch=curvature.sketch,
                layers=curvature.find_layers(self.model),
                num_examples=partial(self._training.num_examples, curvature.max_batches),
                seed=self.seed,
                distributed=self._distributed,
                checkpoint=None if files is None else files.path(curvature),
                checkpoint_every=1 if files is None else files.every,
                device="cpu" if curvature.offload else None,
            )
        if curvature.factor_dtype == "bfloat16":
            factors = factors.to(dtype=torch.bfloat16)
        posterior = LaplacePosterior(factors, offload=curvature.offload)
        return posterior.without_layers(curvature.skip_layers) if curvature.skip_layers else posterior

    def _pass_over_calibration(self) -> None:
        """One pass for all methods: logits, labels and the covariance terms under every curvature."""
        if self._calibration is None:
            raise ValueError(
                "a method uses held-out data, and there are none; declare them in `needs`, and pass a calibration split"
            )
        collected = [c for method in self._methods if method.needs.calibration for c in method.curvatures]
        posteriors = {curvature.digest: self.posterior(curvature) for curvature in collected}
        shards = num_processes() if self._distributed else 1
        each = max(1, self._cache_bytes // max(1, len(posteriors)))
        builders = {
            digest: CacheBuilder(posterior.curvature, max_bytes=each, num_shards=shards)
            for digest, posterior in posteriors.items()
        }
        plain = _LogitsBuilder()
        with failing_together(distributed=self._distributed):
            for batch in lockstep(self.model, self._calibration):
                if not builders:
                    plain.add(BatchView(self.model, self._class_logits, plain_batch(batch)), batch)
                    continue
                terms = posterior_terms(list(posteriors.values()), self.model, self._class_logits, batch)
                for builder, of_posterior in zip(builders.values(), terms, strict=True):
                    builder.add(of_posterior)
        if not builders:
            self._logits = plain.finish(distributed=self._distributed)
            return
        self._caches = {d: builder.finish(distributed=self._distributed) for d, builder in builders.items()}
        self._logits = next(iter(self._caches.values())).all_examples()


class _LogitsBuilder:
    """Collects logits and labels of a pass without curvature."""

    def __init__(self) -> None:
        self._logits: list[Tensor] = []
        self._labels = [torch.empty(0, dtype=torch.int64)]

    def add(self, view: BatchView, batch: Any) -> None:
        count = count_of(batch, len(view.logits))
        missing = torch.full((len(view.logits),), NO_LABEL)
        labels = missing if view.labels is None else checked_labels(view.labels, view.logits, values=False)
        self._logits.append(view.logits[:count].cpu())
        self._labels.append(labels[:count].cpu())

    def finish(self, *, distributed: bool) -> tuple[Tensor, Tensor | None]:
        num_classes = max((part.shape[1] for part in self._logits), default=0)
        if distributed:
            num_classes = max(gather_number(num_classes))
        # A rank without a batch contributes no rows, of that many classes.
        self._logits.append(torch.empty(0, num_classes, dtype=torch.float64))
        logits, labels = joined_logits(self._logits, num_classes), torch.cat(self._labels)
        if distributed:
            logits, labels = gather_examples(logits), gather_examples(labels)
        if not len(labels):
            raise ValueError("no calibration examples: the calibration split is empty; add examples")
        return logits, None if bool((labels == NO_LABEL).all()) else labels
