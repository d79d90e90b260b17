"""Predictions along sampled routes of tokens through the experts, for methods whose routers are uncertain.

Shapes: `S` routes, `B` examples, `K` classes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bmoe_lightning.laplace.predictive import entropy
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.evaluation import average_log_probs
from bmoe_lightning.routers.base import BayesianRouter
from bmoe_lightning.routers.discovery import find_routers
from bmoe_lightning.routers.draws import PositionNoise
from bmoe_lightning.routers.interception import intercepted_routers
from bmoe_lightning.routers.prediction import sampled_routes
from bmoe_lightning.routers.probe import probe_routers
from bmoe_lightning.routers.token_rows import watched_tokens
from bmoe_lightning.routers.types import Router

Routes = Callable[[Sequence[int]], AbstractContextManager[None]]
"""Numbers of samples -> context in which the model runs on a copy of its rows for each, along that sample's route."""


def route_log_probs(batch: BatchView, routes: Routes, num_samples: int, *, per_pass: int = 1) -> Tensor:
    """Log-probabilities of a batch along each of several routes, `[S, B, K]`, from as many forward passes.

    Args:
        batch: View of the batch.
        routes: Function from numbers of samples to the context of their routes.
        num_samples: Number of routes S.
        per_pass: Number of routes that one pass computes together, on copies of the batch's rows.

    Raises:
        ValueError: If the batch cannot be copied; see `BatchView.forward_copies`.
    """
    parts = []
    for first in range(0, num_samples, per_pass):
        samples = range(first, min(first + per_pass, num_samples))
        parts.append(batch.forward_copies(len(samples), routes(samples)).log_softmax(-1))
    return torch.cat(parts)


def sampled_log_probs(
    batch: BatchView, nets: Sequence[BayesianRouter], num_samples: int, *, antithetic: bool, per_pass: int
) -> Tensor:
    """Log-probabilities of a batch along routes that are sampled by Bayesian routers, `[S, B, K]`.

    Args:
        batch: View of the batch.
        nets: The Bayesian routers.
        num_samples: Number of routes S.
        antithetic: Whether samples come in pairs of opposite noise.
        per_pass: Number of routes that one pass computes; see `route_log_probs`.
    """
    noise = position_noise(batch, antithetic=antithetic)
    routes = partial(sampled_routes, batch.model, nets, noise=noise)
    return route_log_probs(batch, routes, num_samples, per_pass=per_pass)


def route_moments(logits: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """The first two moments of the centred logits over routes.

    Args:
        logits: Logits `[B, K]` of the model, `-inf` for absent classes.
        log_probs: Log-probabilities, or logits, `[S, B, K]` along routes.

    Returns:
        The mean `[B, K]`, `-inf` for absent classes, and deviations `D [B, K, S]`, zero for absent classes, of which
        the covariance over routes is `D D^T`.
    """
    present = logits != -torch.inf
    values = torch.where(present, log_probs, 0.0)
    centred = torch.where(present, values - values.sum(-1, keepdim=True) / present.sum(-1, keepdim=True), 0.0)
    mean = centred.mean(0)
    deviations = (centred - mean) / math.sqrt(len(centred))
    return torch.where(present, mean, -torch.inf), deviations.movedim(0, -1)


def position_noise(batch: BatchView, *, antithetic: bool) -> PositionNoise:
    """The random numbers of routes, drawn once for all batches that share `BatchView.lasting`.

    Args:
        batch: View of a batch.
        antithetic: Whether samples come in pairs of opposite noise.
    """
    key = PositionNoise, batch.seed, antithetic
    found: PositionNoise = batch.lasting.setdefault(key, PositionNoise(batch.seed, antithetic=antithetic))
    return found


def located_routers(batch: BatchView, count: int) -> list[Router]:
    """The routers of a model, found once for all batches that share `BatchView.lasting`, unless the model changed.

    Args:
        batch: View of a batch.
        count: Their number when a method was fitted.

    Raises:
        ValueError: If the model has another number of routers.
    """
    located: _Located | None = batch.lasting.get(_Located)
    if located is None or not located.is_of(batch.model):
        located = batch.lasting[_Located] = _Located.of(batch.model)
    if len(located.routers) != count:
        raise ValueError(
            f"the method was fitted to {count} routers, and {type(batch.model).__name__} has {len(located.routers)}; "
            "predict with the model that it was fitted to"
        )
    return list(located.routers)


@dataclass(frozen=True)
class _Located:
    """The routers of a model, and their modules, for as long as they are at the same places."""

    routers: tuple[Router, ...]
    modules: tuple[weakref.ref[nn.Module], ...]

    @classmethod
    def of(cls, model: nn.Module) -> _Located:
        routers = tuple(find_routers(model))
        return cls(routers, tuple(weakref.ref(model.get_submodule(router.name)) for router in routers))

    def is_of(self, model: nn.Module) -> bool:
        try:
            present = [model.get_submodule(router.name) for router in self.routers]
        except AttributeError:
            return False
        return all(module() is found for module, found in zip(self.modules, present, strict=True))


def route_information(log_probs: Tensor) -> Tensor:
    """Mutual information of label and route in nats, `[B]`, from log-probabilities `[S, B, K]` along routes."""
    return (entropy(average_log_probs(log_probs)) - entropy(log_probs).mean(0)).clamp(min=0)


def probed_routers(batch: BatchView) -> list[Router]:
    """The routers of a model, probed on a batch; see `probe_routers`.

    Args:
        batch: View of the batch.

    Raises:
        ValueError: If the model has no routers, one is not supported, or the rows of its tokens are not known.
    """
    routers = probe_routers(batch.model, find_routers(batch.model), lambda: batch.forward()[0])

    def same(_router: Router, _u: Tensor, logits: Tensor) -> Tensor:
        watch.rows(len(logits))
        return logits

    try:
        names = [router.name for router in routers]
        with watched_tokens(batch.model, names) as watch, intercepted_routers(batch.model, routers, same):
            batch.forward()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return routers
