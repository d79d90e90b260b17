"""The posteriors of a fit at prior precision 1, collected in as few passes over the training data as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from bmoe_lightning.curvature.factors import KroneckerFactors
from bmoe_lightning.curvature.gradient_share import GradientShare, GradientShareRecorder, GradientShares
from bmoe_lightning.curvature.kfac import collect_factors, prior_factors
from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.experts.data_record import DataRecorder
from bmoe_lightning.laplace.posterior import LaplacePosterior
from bmoe_lightning.methods.base import Method
from bmoe_lightning.methods.given_data import GivenData
from bmoe_lightning.methods.training_data import PassFiles, TrainingData

_OF_EARLIER_VERSION = GradientShare(None, reason="the fit was written by an earlier version")
_OF_EARLIER_PASS = GradientShare(None, reason="its layers were chosen after the pass over the training data")


class CurvaturePasses:
    """The posteriors of all curvatures of a table, collected when they are first asked for.

    Curvatures that differ in nothing but `skip_layers` share one pass.

    Args:
        model: The trained model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B] or None)`.
        curvatures: The curvatures of the methods to fit.
        training: Training data.
        given: Told of the data of each pass.
        posteriors: Posteriors that are already collected, by the curvature's digest.
        shares: Shares of the trained weights' gradient that they cover, by digest.
        trained: The parameters that were trained; by default those that require gradients.
        seed: Seed for sampled labels and sketch matrices.
        distributed: Whether all ranks of torch.distributed's default group take part, each with its shard of the data.
        pass_files: Location of the checkpoints of the passes; None writes none.

    Attributes:
        posteriors: The posteriors, by digest, as far as they are collected.
        shares: Shares of the trained weights' gradient that they cover, by digest, as far as they are known.
    """

    def __init__(
        self,
        model: nn.Module,
        class_logits: ClassLogits,
        curvatures: Sequence[Curvature],
        training: TrainingData,
        given: GivenData,
        *,
        posteriors: Mapping[str, LaplacePosterior] | None = None,
        shares: Mapping[str, GradientShare] | None = None,
        trained: Sequence[nn.Parameter] | None = None,
        seed: int = 0,
        distributed: bool = False,
        pass_files: PassFiles | None = None,
    ) -> None:
        self.posteriors = dict(posteriors or {})
        self.shares = dict(shares or {})
        self._model = model
        self._class_logits = class_logits
        self._curvatures = tuple(curvatures)
        self._training = training
        self._given = given
        self._trained = trained
        self._seed = seed
        self._distributed = distributed
        self._pass_files = pass_files
        self._factors: dict[str, KroneckerFactors] = {}
        self._shares: dict[str, GradientShares] = {}

    def posterior(self, curvature: Curvature) -> LaplacePosterior:
        """The posterior of a curvature at prior precision 1.

        Raises:
            ValueError: If the data are empty or the model has no such layers; see `collect_factors`.
        """
        if curvature.digest not in self.posteriors:
            factors = self._collected(curvature.of_all_layers())
            if curvature.skip_layers:
                factors = factors.without(curvature.skip_layers)
            self.posteriors[curvature.digest] = LaplacePosterior(factors, offload=curvature.offload)
            if curvature.collects:
                of_pass = self._shares.get(curvature.of_all_layers().digest)
                names = [layer.name for layer in factors.layers]
                self.shares[curvature.digest] = _OF_EARLIER_PASS if of_pass is None else of_pass.of(names)
        return self.posteriors[curvature.digest]

    def share(self, curvature: Curvature) -> GradientShare:
        """The share of the trained weights' gradient that a curvature covers; its `reason` says why it is unknown."""
        self.posterior(curvature)
        return self.shares.get(curvature.digest, _OF_EARLIER_VERSION)

    def is_missing(self, curvature: Curvature) -> bool:
        """Whether a curvature needs a pass."""
        return not {curvature.digest, curvature.of_all_layers().digest} & self.posteriors.keys()

    def check_share(self, method: Method, curvature: Curvature) -> None:
        """Refuse a curvature of an existing fit whose pass did not measure the share of the gradient.

        Args:
            method: A method that uses the share.
            curvature: One of its curvatures.

        Raises:
            ValueError: If the share is unknown.
        """
        if self.is_missing(curvature):
            return  # its pass will
        share = self.shares.get(curvature.digest, _OF_EARLIER_VERSION)
        if curvature.digest not in self.posteriors:
            share = _OF_EARLIER_PASS
        if share.kappa is None:
            raise ValueError(
                f"{method.name} uses the share of the trained weights' gradient that its curvature covers, which the "
                f"existing fit does not have: {share.reason}; fit into another folder, or remove the method"
            )

    def _choices(self, curvature: Curvature) -> list[set[str]]:
        """The names of the layers of each posterior whose factors are those of a curvature that skips no layer."""
        found = {c.digest: c for c in self._curvatures if c.of_all_layers().digest == curvature.digest}
        return [{layer.name for layer in c.posterior_layers(self._model)} for c in found.values()]

    def _collected(self, curvature: Curvature) -> KroneckerFactors:
        """The factors of a curvature that skips no layer."""
        if curvature.digest in self.posteriors:
            return self.posteriors[curvature.digest].factors
        if curvature.digest not in self._factors:
            self._factors[curvature.digest] = self._pass_over_training(curvature)
        return self._factors[curvature.digest]

    def _pass_over_training(self, curvature: Curvature) -> KroneckerFactors:
        if not curvature.collects:
            factors = prior_factors(self._model, curvature.find_layers(self._model))
        else:
            files, limit = self._pass_files, curvature.max_batches
            recorder = DataRecorder(distributed=self._distributed, max_batches=limit)
            layers = curvature.find_layers(self._model)
            share = GradientShareRecorder(
                self._model,
                layers,
                choices=self._choices(curvature),
                trained=self._trained,
                seed=self._seed,
                distributed=self._distributed,
            )
            factors = collect_factors(
                self._model,
                self._class_logits,
                self._training.batches(limit),
                rank=curvature.rank,
                fisher=curvature.fisher,
                approximation=curvature.approximation,
                sketch=curvature.sketch,
                layers=layers,
                num_examples=partial(self._training.num_examples, limit),
                seed=self._seed,
                distributed=self._distributed,
                checkpoint=None if files is None else files.path(curvature),
                checkpoint_every=1 if files is None else files.every,
                device="cpu" if curvature.offload else None,
                record=recorder,
                share=share,
            )
            self._shares[curvature.digest] = share.finish()
            self._given.see_training(recorder.finish())
        if curvature.factor_dtype == "bfloat16":
            factors = factors.to(dtype=torch.bfloat16)
        return factors
