"""Predictions along sampled routes of tokens through the experts, for methods whose routers are uncertain.

Shapes: `S` routes, `B` examples, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from bmoe_lightning.laplace.predictive import entropy
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.evaluation import average_log_probs
from bmoe_lightning.routers.discovery import find_routers
from bmoe_lightning.routers.interception import intercepted_routers
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
        with watched_tokens(batch.model) as watch, intercepted_routers(batch.model, routers, same):
            batch.forward()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return routers
