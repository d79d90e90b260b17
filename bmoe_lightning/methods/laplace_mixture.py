"""Mixture of Laplace posteriors: a Laplace posterior around the final weights of each of several runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from bmoe_lightning.experts.threads import model_lock
from bmoe_lightning.experts.weight_comparison import PresentWeights
from bmoe_lightning.laplace.posterior import WeightMismatchError
from bmoe_lightning.laplace.predictive import LinkName
from bmoe_lightning.laplace.prior import Scope
from bmoe_lightning.methods.base import PRIOR_PRECISION, CurvatureMethod, MemberFit, State, check_choice, state_numbers
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.fit_index import has_fit, unreadable
from bmoe_lightning.methods.fit_result import FitResult, NotFittedError
from bmoe_lightning.methods.laplace_evidence import LaplaceEvidence
from bmoe_lightning.methods.laplace_lpo import LaplaceLPO
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.posterior_options import link_option, num_samples_option, prior_mean_option, scope_option
from bmoe_lightning.methods.storage import load_fit
from bmoe_lightning.methods.weight_ensemble import weight_members
from bmoe_lightning.methods.workbench import PriorMeanName, Workbench
from bmoe_lightning.utils.messages import shown_path

ComponentName = Literal["laplace_lpo", "laplace_evidence"]


@dataclass(frozen=True)
class LaplaceMixture(CurvatureMethod):
    """Averages the probabilities of the Laplace posteriors of several runs, including this one.

    Each run has a posterior around its final weights, with its curvature and prior precision, and all have the same
    share of the mixture. Without variances it is a deep ensemble of the same runs. Eschenhagen, Daxberger, Hennig and
    Kristiadi 2021, Mixtures of Laplace Approximations for Improved Post-Hoc Uncertainty in Deep Learning.

    Raises:
        ValueError: If `size` is below 2, the numbers of `runs` and `fits` differ, the component, scope, prior mean or
            link is unknown, or there is less than one sample.
    """

    name: str = "laplace_mixture"
    label: str = "Mixture of Laplace posteriors"
    component: ComponentName = option(
        "laplace_lpo",
        "Method of each posterior: `laplace_lpo`, or `laplace_evidence`, which uses no held-out data.",
    )
    size: int = option(
        3,
        "Number of posteriors, including that of this run; where `runs` are given, one more than these.",
        prediction_only=True,
        trial=2,
    )
    runs: tuple[str, ...] = option(
        (),
        "Snapshot files with the final weights of the other runs; recipes train these runs and set this.",
        prediction_only=True,
    )
    fits: tuple[str, ...] = option(
        (),
        "For each of `runs` the folder of its fit of the component, `dirpath` of its callback; recipes set this.",
        prediction_only=True,
    )
    scope: Scope = scope_option()
    prior_mean: PriorMeanName = prior_mean_option("Prior mean of the evidence")
    link: LinkName = link_option()
    num_samples: int = num_samples_option()

    positive_state: ClassVar[tuple[str, ...]] = (PRIOR_PRECISION,)
    source = "https://arxiv.org/abs/2111.03577"
    cost = "one forward pass and K - 1 backward passes to the experts' outputs per member"

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(map(str, self.runs)))
        object.__setattr__(self, "fits", tuple(map(str, self.fits)))
        check_choice("component", self.component, get_args(ComponentName))
        if self.size < 2:
            raise ValueError(f"{self.name} needs at least 2 posteriors, got size={self.size}")
        if len(self.runs) != len(self.fits):
            raise ValueError(
                f"{self.name} needs a fit of {self.component} to each of its runs, got {len(self.runs)} runs and "
                f"{len(self.fits)} fits; pass fits= with one folder for each of runs="
            )
        self.posterior  # noqa: B018  (checks the other options)

    @property
    def posterior(self) -> LaplaceLPO | LaplaceEvidence:
        """The method that is fitted to each run, under the name of this one."""
        is_lpo = self.component == "laplace_lpo"
        kind: type[LaplaceLPO | LaplaceEvidence] = LaplaceLPO if is_lpo else LaplaceEvidence
        return kind(
            name=self.name,
            label=self.label,
            curvature=self.curvature,
            scope=self.scope,
            prior_mean=self.prior_mean,
            link=self.link,
            num_samples=self.num_samples,
        )

    @property
    def needs(self) -> Needs:
        runs = 0 if self.runs else self.size - 1
        return replace(self.posterior.needs, runs=runs, run_methods=(self.posterior,))

    def check_run(
        self,
        model: nn.Module,
        folder: Path | None,
        *,
        ranks_per_node: int = 1,
        trained: Sequence[nn.Parameter] | None = None,
    ) -> None:
        """Check the fits of the other runs, and that they are to the weights in `runs`.

        Raises:
            ValueError: If a file or a fit is missing, or the model has no such parameters.
            NotFittedError: If a folder has no fit of the component with these options.
            WeightMismatchError: If a fit is to other weights.
        """
        self.check_members(model, {}, ())

    def fit(self, work: Workbench) -> State:
        return self.posterior.fit(work)

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        return self.posterior.log_probs(batch, state)

    def members(
        self, model: nn.Module, state: State, snapshots: Sequence[Path]
    ) -> Sequence[AbstractContextManager[MemberFit | None]]:
        current, *others = weight_members(self.name, model, [Path(run) for run in self.runs], include_current=True)
        members = zip(others, self.runs, self.fits, strict=True)
        return [current, *(self._member(model, weights, run, Path(folder)) for weights, run, folder in members)]

    def check_members(self, model: nn.Module, state: State, snapshots: Sequence[Path]) -> None:
        """Read the weights and the fit of every other run, and compare them.

        Raises:
            ValueError, NotFittedError, WeightMismatchError: See `check_run`.
        """
        for member in self.members(model, state, snapshots)[1:]:
            with model_lock(model), member:
                pass

    def hyperparameters(self, state: State) -> dict[str, float]:
        return {"members": len(self.runs) + 1, **state_numbers(state)}

    @contextmanager
    def _member(
        self, model: nn.Module, weights: AbstractContextManager[None], run: str, folder: Path
    ) -> Iterator[MemberFit]:
        """The posterior of another run, with its weights in the model."""
        fit, method = self._fit_in(folder, run)
        with weights:
            found = fit.compared(PresentWeights(model))
            if not found.same:
                raise WeightMismatchError(
                    f"the fit in {shown_path(folder)} is to other weights than {run} gives the model{found.reason()}; "
                    "pass in fits= the folder of the fit to this run, in the order of runs=, or fit it again"
                )
            posteriors = fit.posteriors_for(method.prediction_curvatures, model)
            yield MemberFit(fit.state_of(method), posteriors, fit.warnings_of(method))

    def _fit_in(self, folder: Path, run: str) -> tuple[FitResult, LaplaceLPO | LaplaceEvidence]:
        """The fit in a folder, and the method of it that is the component, whatever its name."""
        error = unreadable(folder)
        if error is not None:
            raise error
        if not has_fit(folder):
            raise FileNotFoundError(
                f"{self.name} needs a fit of {self.component} to the weights in {run}, and {shown_path(folder)} has no "
                f"fit; train that run with BayesianMoECallback(methods=[{self.component!r}], dirpath=...) or call its "
                "fit_posterior, and pass the folder in fits="
            )
        wanted = self.posterior
        fit = load_fit(folder, offload=[c.digest for c in wanted.curvatures if c.offload])[0]
        named = [replace(wanted, name=name) for name in fit.methods]
        method = next((candidate for candidate in named if fit.is_fitted(candidate)), None)
        if method is None:
            differing = fit.differences(replace(wanted, name=self.component))
            reason = f": it was fitted with {', '.join(differing)}" if differing else ""
            raise NotFittedError(
                f"{shown_path(folder)} has no fit of {self.component} with the options of {self.name}{reason}; fit it "
                f"to the weights in {run} with the same curvature, scope and prior mean"
            )
        return fit, method
