"""The cost of predictions with random routers relative to plain forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from bmoe_lightning.routers import (
    BayesianRouter,
    FixedNoise,
    FullCovarianceLogits,
    MeanFieldLogits,
    PositionNoise,
    Router,
    TemperatureChoice,
    averaged_scores,
    choice_ways,
    find_routers,
    probe_routers,
    sampled_routes,
)
from recipes.benchmark.measure import Amount, Ratio, Section
from recipes.benchmark.workload import Workload
from recipes.common.timing import Action, in_turn

ROUTES = 8
"""Number of routes whose predictions are averaged."""
SAMPLES = 35
"""Number of samples whose scores are averaged, as in https://arxiv.org/abs/2509.23830."""
_ROUTES_BAR = 1.05
_SCORES_BAR = 1.15


def measure_routers(work: Workload, repeats: int) -> Section:
    """Time interleaved predictions of every kind of random router, and plain forward passes.

    Args:
        work: Model and batch.
        repeats: Number of rounds.
    """
    kinds = _kinds(work)
    noise = PositionNoise(0)
    actions: dict[str, Action] = {"forward": work.forward}
    for name, nets in kinds.items():
        actions[f"predictions, {name}"] = partial(_routes, work, nets, noise)
        actions[f"scores, {name}"] = partial(_scores, work, nets, noise)
    times = in_turn(actions, repeats, work.device)
    forward = times["forward"]
    several = tuple(ROUTES * value for value in forward)
    ratios = []
    for name in kinds:
        # A full covariance has N / 2 times the products, and none is promised.
        bar = None if name == _FULL else _SCORES_BAR
        predicted, scored = times[f"predictions, {name}"], times[f"scores, {name}"]
        ratios += [
            Ratio(f"average of predictions / {ROUTES} forwards, {name}", predicted, several, _ROUTES_BAR),
            Ratio(f"average of scores / forward, {name}", scored, forward, bar),
        ]
    return Section(
        "routers",
        "Random routers / plain forward passes",
        (
            f"All routers are random. Predictions are averaged over {ROUTES} routes, a forward pass each; scores over "
            f"{SAMPLES} samples in every router, in one pass. Random numbers are drawn before.",
        ),
        ratios=tuple(ratios),
        amounts=tuple(Amount(name, "s", values) for name, values in times.items()),
    )


_FULL = "full covariance"


def _kinds(work: Workload) -> Mapping[str, Sequence[BayesianRouter]]:
    """The kinds of random routers, as they are before training."""
    run = partial(_logits, work)
    routers = probe_routers(work.model, find_routers(work.model), run, layers=work.layers)
    makers: Mapping[str, Callable[[Router], BayesianRouter]] = {
        "noise of one size": lambda router: FixedNoise(router, 1.0),
        "mean field": lambda router: MeanFieldLogits(router, 1.0),
        _FULL: lambda router: FullCovarianceLogits(router, 1.0),
    }
    kinds = {name: [make(router).to(work.device) for router in routers] for name, make in makers.items()}
    way = choice_ways(work.model, routers, run)
    drawn = [TemperatureChoice(router, returns_choice=way).to(work.device) for router in routers]
    return {**kinds, "a temperature for each token": drawn}


def _logits(work: Workload) -> Tensor:
    with torch.no_grad():
        return work.class_logits()(work.model, work.batch)[0]


def _routes(work: Workload, nets: Sequence[BayesianRouter], noise: PositionNoise) -> None:
    for sample in range(ROUTES):
        with sampled_routes(work.model, nets, [sample], noise):
            work.forward()


def _scores(work: Workload, nets: Sequence[BayesianRouter], noise: PositionNoise) -> None:
    with averaged_scores(work.model, nets, SAMPLES, noise):
        work.forward()
