"""Two sources of uncertainty at once: a Laplace posterior over the experts, and noise on which experts a token gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bmoe_lightning.curvature.spec import Curvature
from bmoe_lightning.experts.data_record import compared
from bmoe_lightning.laplace.covariance_cache import CovarianceCache
from bmoe_lightning.laplace.predictive import NUM_SAMPLES, LinkName, check_link, class_probabilities, mean_variance
from bmoe_lightning.laplace.prior import LogNormalPrior, fit_lpo
from bmoe_lightning.laplace.uncertainty_scores import uncertainty_scores
from bmoe_lightning.laplace.widened_cache import WidenedCache
from bmoe_lightning.methods.base import PRIOR_PRECISION, State, scalar, state_numbers
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.evaluation import average_log_probs
from bmoe_lightning.methods.laplace_lpo import LaplaceLPO
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.noise_routes import NoiseRoutes, check_noise_state, check_scales, warn_of_scale
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.posterior_options import link_option
from bmoe_lightning.methods.routes import route_information, route_moments
from bmoe_lightning.methods.workbench import Workbench
from bmoe_lightning.routers.costs import RoutingCost, noise_cost
from bmoe_lightning.routers.gaps import check_gaps
from bmoe_lightning.routers.types import Router
from bmoe_lightning.utils.fit_warnings import collected_fit_warnings

_JOINT, _SHARE, _MIXTURE = "joint_precision", "posterior_share", "mixture"


@dataclass(frozen=True)
class LaplaceRouterNoise(LaplaceLPO):
    """Laplace posterior over `down_proj` of every expert, and router noise, fitted together on held-out labels.

    Both together are a Gaussian over logits under `link`: its covariance is that of the posterior along the model's own
    routes, from one linearised pass, plus that of the logits over `num_samples` routes, and its mean is that over
    routes, so that it has the first two moments of the mixture of posteriors over routes. At each candidate scale of
    the noise, 0 among them, the prior precision minimises the MC NLL beside the covariance over routes, since two
    covariances that were fitted alone would both account for the same overconfidence.

    Either one alone is a candidate, too: the posterior of `laplace_lpo`, and at each scale the mixture of the
    predictions along routes of `router_noise`, which is no Gaussian. What has the least NLL on the held-out labels,
    each as it would be predicted, is used; `mixture` in the hyperparameters is 1 if that is `router_noise`'s, which
    takes no backward pass. So the held-out NLL is at most that of `laplace_lpo` with the same curvature, scope, link
    and number of the link's samples, and at most that of `router_noise` with the same scales and routes. That is
    exact while the covariance terms of the held-out data fit into the curvature's `cache_bytes`; otherwise candidates
    are compared on the examples that have terms, with approximate covariances. It says nothing of other data.

    On the recipe's built-in task the Gaussian's NLL is within .012 of that of the mixture of posteriors over routes,
    with one linearised pass for each of 8 routes. Around the model's own logits it is up to .10 away, and the jointly
    fitted validation NLL is no lower: .722, .797 and .876 in three seeds, against .719, .797 and .876.

    Raises:
        ValueError: If the scope or link is unknown, there is less than one sample or route, or a scale is not positive.
    """

    name: str = "laplace_router_noise"
    label: str = "Bayesian-MoE + router noise"
    num_samples: int = option(16, "Number of routes.", trial=2)
    scales: tuple[float, ...] = option(
        (0.5, 1.0, 2.0, 3.0, 4.0, 6.0),
        "Candidates for the scale of the noise, in units of each layer's gap; 0, no noise, is another one.",
        trial=(1.0,),
    )
    antithetic: bool = option(True, "Whether routes come in pairs of opposite noise.")
    samples_per_pass: int = option(
        1,
        "Number of routes that one forward pass computes, on copies of the batch's rows.",
        prediction_only=True,
    )
    # What is predicted decides between the candidates, so these two affect the fit here.
    link: LinkName = link_option(prediction_only=False)
    link_samples: int = option(NUM_SAMPLES, "Number of Monte Carlo samples of the link.")

    cost = (
        "`num_samples` + 1 forward passes and K - 1 backward passes to the experts' outputs; without the posterior, "
        "`num_samples` forward passes"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scales", tuple(self.scales))
        check_link(self.link, self.link_samples)
        self._routes  # noqa: B018  (checks its options)
        check_scales(self.scales)

    @property
    def needs(self) -> Needs:
        return replace(super().needs, routers=True)

    def curvatures_of(self, state: State) -> tuple[Curvature, ...]:
        return self.prediction_curvatures if float(state[_SHARE]) else ()

    def routing_cost(self, d_in: int, num_experts: int) -> RoutingCost:
        """What a prediction takes in a router; the posterior's forward pass is along the model's own routes."""
        return RoutingCost(self.num_samples + 1, noise_cost(num_experts, 1), parameters=1)

    def check_routers(self, model: nn.Module, routers: Sequence[Router], run: Callable[[], Tensor]) -> None:
        super().check_routers(model, routers, run)
        check_gaps(routers)

    def fit(self, work: Workbench) -> State:
        split = work.labelled_logits()
        cache, prior = work.covariances(self.spec), self._prior(work)
        scales = sorted(self.scales)
        plain, routes, labels = self._routes.held_out(work, scales, work.router_gaps())
        if compared(split, (plain, labels)) != "":
            raise ValueError(
                f"{self.name} combines passes over the held-out data, and each had another order of the examples; use "
                "a loader that does not shuffle"
            )
        examples = cache.positions()
        candidates = [self._posterior(work, cache, 0.0, prior), _mixture(plain[examples], cache, 0.0)]
        for scale, along in zip(scales, routes, strict=True):
            mean, deviations = route_moments(split[0], along)
            widened = WidenedCache.of(cache, mean, deviations)
            joint = self._posterior(work, widened, scale, prior)
            candidates += [joint, self._gaussian(work, widened, scale, torch.full_like(joint.precision, math.inf))]
            candidates.append(_mixture(average_log_probs(along)[examples], cache, scale))
        # The first one of equal ones: with less noise, and with a posterior.
        best = min(candidates, key=lambda candidate: candidate.nll)
        for sentence in best.doubts:
            work.warn(sentence)
        if best.scale == 0:
            work.warn(_ONLY_POSTERIOR if best.share else _NEITHER)
        elif not best.share and not best.is_mixture:
            work.warn(_ONLY_ROUTES)
        warn_of_scale(work, best.scale, scales[-1], work.routers())
        unit = work.router_gaps()
        return {
            PRIOR_PRECISION: candidates[0].precision,
            _JOINT: best.precision if best.share else candidates[0].precision,
            _SHARE: scalar(best.share),
            _MIXTURE: torch.tensor(int(best.is_mixture)),
            "scale": scalar(best.scale),
            "unit": unit,
            "sigma": best.scale * unit,
        }

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        if not int(state[_MIXTURE]):
            return self._linked(*self._moments(batch, state), seed=batch.seed)
        if not state["sigma"].any():
            return batch.logits.log_softmax(-1)
        return average_log_probs(self._routes.log_probs(batch, state["sigma"]))

    def logit_covariance(self, batch: BatchView, state: State) -> tuple[Tensor, Tensor] | None:
        """Mean logits `[B, K]`, and the sum `[B, K, K]` of the posterior's covariance and that over routes.

        None where predictions are a mixture over routes, which is no link of a Gaussian.
        """
        return None if int(state[_MIXTURE]) else self._moments(batch, state)

    def uncertainty(self, batch: BatchView, state: State) -> dict[str, Tensor]:
        """Mutual information of the label with weights and route in nats, and the variance of the logits."""
        if int(state[_MIXTURE]):
            routes = self._routes.log_probs(batch, state["sigma"])
            mean, deviations = route_moments(routes[0], routes)
            variance = mean_variance(mean, deviations @ deviations.mT)
            return {"mutual_information": route_information(routes), "logit_variance": variance}
        scores = uncertainty_scores(*self._moments(batch, state), num_samples=1000, seed=batch.seed)
        return {name: scores[name] for name in ("mutual_information", "logit_variance")}

    def check_state(self, state: State) -> None:
        super().check_state(state)
        check_noise_state(state)
        joint, share = state.get(_JOINT), state.get(_SHARE)
        if joint is None or joint.dtype != torch.float64 or joint.shape != state[PRIOR_PRECISION].shape:
            raise ValueError(f"{_JOINT!r} must be float64 and have an entry for each layer")
        if not bool((joint > 0).all()):
            raise ValueError(f"{_JOINT!r} must be positive, and is {joint.tolist()}")
        if share is None or share.dim() or float(share) not in (0.0, 1.0):
            raise ValueError(f"{_SHARE!r} must be 0 or 1")
        mixture = state.get(_MIXTURE)
        if mixture is None or mixture.dtype != torch.int64 or mixture.dim() or int(mixture) not in (0, 1):
            raise ValueError(f"{_MIXTURE!r} must be int64, and 0 or 1")
        if int(mixture) and float(share):
            raise ValueError(
                f"{_SHARE!r} must be 0 where {_MIXTURE!r} is 1, since a mixture of routes has no posterior"
            )

    def hyperparameters(self, state: State) -> dict[str, float]:
        found = {key: state[key] for key in (_MIXTURE, "scale", "sigma")}
        if float(state[_SHARE]):
            found[PRIOR_PRECISION] = state[_JOINT]
        return {"num_samples": self.num_samples, **state_numbers(found)}

    @property
    def _routes(self) -> NoiseRoutes:
        return NoiseRoutes(self.num_samples, self.antithetic, self.samples_per_pass)

    def _moments(self, batch: BatchView, state: State) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the Gaussian over logits."""
        routes = self._routes.log_probs(batch, state["sigma"]) if state["sigma"].any() else None
        if float(state[_SHARE]):
            logits, covariance = batch.covariance(self.spec, state[_JOINT])
        else:
            logits = batch.logits if routes is None else routes[0]
            covariance = logits.new_zeros(*logits.shape, logits.shape[1])
        if routes is None:
            return logits, covariance
        mean, deviations = route_moments(logits, routes)
        return mean, covariance + deviations @ deviations.mT

    def _linked(self, logits: Tensor, covariance: Tensor, *, seed: int) -> Tensor:
        return class_probabilities(logits, covariance, self.link, num_samples=self.link_samples, seed=seed)

    def _posterior(
        self, work: Workbench, cache: CovarianceCache, scale: float, prior: LogNormalPrior | None
    ) -> _Candidate:
        """The posterior that is fitted at one scale of the noise."""
        with collected_fit_warnings() as doubts:
            precision = fit_lpo(cache, self.scope, prior=prior, seed=work.seed, names=work.layer_names(self.spec))
        return replace(self._gaussian(work, cache, scale, precision), share=1.0, doubts=tuple(doubts))

    def _gaussian(self, work: Workbench, cache: CovarianceCache, scale: float, precision: Tensor) -> _Candidate:
        """The Gaussian at one scale of the noise and one precision, infinite for a posterior without variance."""
        log_probs = self._linked(cache.logits, cache.covariance(precision), seed=work.seed)
        return _Candidate(_nll(log_probs, cache), scale, precision)


_ONLY_POSTERIOR = (
    "the noise of the routers is fitted as 0 beside the posterior: none of the scales lowers the NLL of the held-out "
    "labels, so the predictions are those of the posterior alone"
)
_ONLY_ROUTES = (
    "the posterior is fitted without variance beside the noise of the routers: no prior precision lowers the NLL of "
    "the held-out labels, so the predictions are those of the routes alone"
)
_NEITHER = (
    "noise of the routers and posterior are both fitted as 0: neither lowers the NLL of the held-out labels, so the "
    "predictions are those of the model itself"
)


@dataclass(frozen=True)
class _Candidate:
    """Held-out NLL of what would be predicted with a scale and a precision, and whether the posterior has variance."""

    nll: float
    scale: float
    precision: Tensor
    share: float = 0.0
    doubts: tuple[str, ...] = ()
    is_mixture: bool = False


def _mixture(log_probs: Tensor, cache: CovarianceCache, scale: float) -> _Candidate:
    """The mixture over routes at one scale of the noise, from its log-probabilities `[N, K]`."""
    return _Candidate(_nll(log_probs, cache), scale, torch.empty(0), is_mixture=True)


def _nll(log_probs: Tensor, cache: CovarianceCache) -> float:
    """Mean NLL of the examples of a cache."""
    _, labels = cache.labelled()
    return -float(log_probs.gather(1, labels.unsqueeze(1)).mean())
