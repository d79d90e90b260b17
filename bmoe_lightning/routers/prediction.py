"""Passes through a model with Bayesian routers: a route for each sample, averaged scores, or their mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bmoe_lightning.routers.base import BayesianRouter
from bmoe_lightning.routers.choices import injected_routers
from bmoe_lightning.routers.draws import PositionNoise, SampleDraws, check_copies
from bmoe_lightning.routers.interception import intercepted_routers
from bmoe_lightning.routers.scores import at_least_float32, sample_chunks
from bmoe_lightning.routers.selection import gate_entropy
from bmoe_lightning.routers.token_rows import watched_tokens
from bmoe_lightning.routers.types import Router


@contextmanager
def sampled_routes(
    model: nn.Module, nets: Sequence[BayesianRouter], samples: Sequence[int], noise: PositionNoise
) -> Iterator[None]:
    """Sample the logits of routers while a model runs on a copy of its rows for each sample.

    Args:
        model: The model.
        nets: Bayesian routers of some of its routers.
        samples: Numbers of the samples. The rows that the model runs on are as many copies of a batch, one after
            another, and each gets the numbers of its sample.
        noise: The random numbers.
    """
    with watched_tokens(model, [net.router.name for net in nets]) as watch:

        def sampled(net: BayesianRouter, u: Tensor, logits: Tensor) -> Tensor:
            rows = watch.rows(len(logits), net.router, u)

            def draws(of: Sequence[int]) -> SampleDraws:
                return SampleDraws(noise, net.router, rows, of, copies=True, device=logits.device)

            if len(samples) == 1 or net.numbers_per_token:
                return net.samples(u, logits, draws(samples))[0]
            check_copies(len(rows.mask), len(samples))
            copies = zip(u.chunk(len(samples)), logits.chunk(len(samples)), samples, strict=True)
            return torch.cat([net.samples(inputs, own, draws([sample]))[0] for inputs, own, sample in copies])

        with injected_routers(model, nets, sampled):
            yield


@contextmanager
def averaged_scores(
    model: nn.Module, nets: Sequence[BayesianRouter], num_samples: int, noise: PositionNoise
) -> Iterator[None]:
    """Replace the logits of routers while a model runs, by those whose scores are the average over samples.

    The experts are chosen once, by the averaged scores, so that this is one pass through the model and no average over
    routes: noise of one size on all logits keeps their order on average, and the averaged scores are flatter.

    Args:
        model: The model.
        nets: Bayesian routers of some of its routers, which are probed (see `probe_routers`).
        num_samples: Number of samples.
        noise: The random numbers.

    Raises:
        ValueError: If the scores of a router are neither a softmax nor a sigmoid; raised from within the model.
    """
    with watched_tokens(model, [net.router.name for net in nets]) as watch:

        def averaged(net: BayesianRouter, u: Tensor, logits: Tensor) -> Tensor:
            rows = watch.rows(len(logits), net.router, u)
            chunks = (
                SampleDraws(noise, net.router, rows, chunk, copies=False, device=logits.device)
                for chunk in sample_chunks(num_samples, len(logits) * net.floats_per_token)
            )
            return net.averaged(u, logits, chunks)

        with injected_routers(model, nets, averaged):
            yield


def mean_routers(model: nn.Module, nets: Sequence[BayesianRouter]) -> AbstractContextManager[None]:
    """Replace the logits of routers by the means of their distributions while a model runs: no sample is drawn.

    Args:
        model: The model.
        nets: Bayesian routers of some of its routers.
    """

    def mean(net: BayesianRouter, u: Tensor, logits: Tensor) -> Tensor:
        return logits if net.returns_choice else net.mean(u, logits)

    return injected_routers(model, nets, mean)


@dataclass
class RouterSignals:
    """How uncertain routers are at the last real token of each row, by the index of the router, `[R]` for each call.

    Empty where sequences share a row, such as choices after one prompt.

    Attributes:
        variances: Variance of the logits without their common shift, in closed form; of routers that have one.
        entropies: Entropy of the gate in nats.
    """

    variances: dict[int, list[Tensor]] = field(default_factory=dict)
    entropies: dict[int, list[Tensor]] = field(default_factory=dict)


@contextmanager
def recorded_signals(model: nn.Module, nets: Sequence[BayesianRouter]) -> Iterator[RouterSignals]:
    """Record how uncertain routers are while a model runs; their logits stay as they are.

    Within `mean_routers`, this is what they are at the means of the routers before.

    Args:
        model: The model.
        nets: Bayesian routers of some of its routers.
    """
    signals, of_router = RouterSignals(), {net.router: net for net in nets}

    def record(router: Router, u: Tensor, logits: Tensor) -> Tensor:
        net, last = of_router[router], watch.rows(len(logits)).last
        if last is None:
            return logits
        last = last.to(logits.device)
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            inputs, own = u[last], logits[last]
            found = net.distribution(inputs, own)
            if found is not None:
                signals.variances.setdefault(router.index, []).append(found.centred_trace().double())
            entropy = _entropy(net.gate_logits(inputs, own), router)
            signals.entropies.setdefault(router.index, []).append(entropy.double())
        return logits

    names = [router.name for router in of_router]
    with watched_tokens(model, names) as watch, intercepted_routers(model, list(of_router), record):
        yield signals


def _entropy(logits: Tensor, router: Router) -> Tensor:
    """The entropy of the scores of a gate, `[R]`; sigmoids are normalised to sum to one."""
    logits = at_least_float32(logits)
    return gate_entropy(F.logsigmoid(logits) if router.score == "sigmoid" else logits)
