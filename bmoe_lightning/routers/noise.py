"""Gaussian noise on the logits of routers, in passes through the model: a route for each sample, or averaged scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bmoe_lightning.routers.interception import intercepted_routers
from bmoe_lightning.routers.scores import at_least_float32, mean_scores, sample_chunks
from bmoe_lightning.routers.streams import sample_noise
from bmoe_lightning.routers.token_rows import TokenRows, watched_tokens
from bmoe_lightning.routers.types import Router


class PositionNoise:
    """Standard normal numbers by router, sample and position of the token; those that were drawn are kept.

    Args:
        seed: Seed, not negative.
        antithetic: Whether each sample of odd number mirrors the one before.
    """

    def __init__(self, seed: int, *, antithetic: bool = True) -> None:
        self._seed, self._antithetic = seed, antithetic
        self._tables: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def at(self, rows: TokenRows, router: Router, samples: Sequence[int]) -> Tensor:
        """The numbers of the tokens of a router under each sample, `[S, R, T, N]` float32.

        Args:
            rows: Rows of the tokens, R of T.
            router: The router.
            samples: Numbers of the samples.
        """
        return self._table(rows, router, samples)[:, rows.positions]

    def of_copies(self, rows: TokenRows, router: Router, samples: Sequence[int]) -> Tensor:
        """The numbers where the rows are a copy for each sample, one after another: `[R, T, N]` float32.

        Raises:
            RuntimeError: If the number of rows is no multiple of the number of samples.
        """
        number, copies = len(rows.positions), len(samples)
        if number % copies:
            raise RuntimeError(
                f"the model ran on {number} rows, which are no {copies} copies of a batch; compute one sample at a time"
            )
        copy = torch.arange(number, device=rows.positions.device) // (number // copies)
        return self._table(rows, router, samples)[copy.unsqueeze(1), rows.positions]

    def _table(self, rows: TokenRows, router: Router, samples: Sequence[int]) -> Tensor:
        """`[S, L, N]`, with L positions or more."""
        key = router.index, tuple(samples)
        length = int(rows.positions.max()) + 1
        table = self._tables.get(key)
        if table is None or table.shape[1] < length or table.device != rows.positions.device:
            table = sample_noise(
                (length, router.num_experts),
                seed=self._seed,
                router=router.index,
                samples=samples,
                antithetic=self._antithetic,
            ).to(rows.positions.device)
            self._tables[key] = table
        return table


@contextmanager
def sampled_routes(
    model: nn.Module, routers: Sequence[Router], scales: Sequence[float], samples: Sequence[int], noise: PositionNoise
) -> Iterator[None]:
    """Add Gaussian noise to the logits of routers while a model runs on a copy of its rows for each sample.

    Args:
        model: The model.
        routers: Its routers.
        scales: Standard deviation of the noise of each router; with 0 its logits are left as they are.
        samples: Numbers of the samples. The rows that the model runs on are as many copies of a batch, one after
            another, and each gets the noise of its sample.
        noise: The noise.
    """
    with watched_tokens(model) as watch:

        def noisy(router: Router, _u: Tensor, logits: Tensor) -> Tensor:
            scale = scale_of[router]
            if scale == 0:
                return logits
            added = noise.of_copies(watch.rows(len(logits)), router, samples).flatten(0, 1)
            return (at_least_float32(logits) + scale * added.to(logits.device)).to(logits.dtype)

        scale_of = dict(zip(routers, scales, strict=True))
        with intercepted_routers(model, routers, noisy):
            yield


@contextmanager
def averaged_scores(
    model: nn.Module, routers: Sequence[Router], scales: Sequence[float], num_samples: int, noise: PositionNoise
) -> Iterator[None]:
    """Replace the logits of routers while a model runs, by those whose scores are the average over noise.

    The experts are chosen once, by the averaged scores, so that this is one pass through the model and no average over
    routes: noise of one size on all logits keeps their order on average, and the averaged scores are flatter.

    Args:
        model: The model.
        routers: Its routers, probed (see `probe_routers`).
        scales: Standard deviation of the noise of each router; with 0 its logits are left as they are.
        num_samples: Number of samples.
        noise: The noise.

    Raises:
        ValueError: If the scores of a router are neither a softmax nor a sigmoid; raised from within the model.
    """
    with watched_tokens(model) as watch:

        def averaged(router: Router, _u: Tensor, logits: Tensor) -> Tensor:
            scale = scale_of[router]
            if scale == 0:
                return logits
            mean, rows = at_least_float32(logits), watch.rows(len(logits))
            chunks = sample_chunks(num_samples, logits.numel())
            drawn = (mean + scale * noise.at(rows, router, chunk).flatten(1, 2).to(logits.device) for chunk in chunks)
            return mean_scores(drawn, router.score or "other").logits(mean).to(logits.dtype)

        scale_of = dict(zip(routers, scales, strict=True))
        with intercepted_routers(model, routers, averaged):
            yield
