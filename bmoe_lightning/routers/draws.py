"""The random numbers that a Bayesian router is given: of one training step, or of samples of a prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from bmoe_lightning.routers.streams import NoiseKind, sample_noise, step_noise
from bmoe_lightning.routers.token_rows import TokenRows
from bmoe_lightning.routers.types import Router


class Draws(ABC):
    """Random numbers for some samples of a router's logits; see `bmoe_lightning.routers.streams`.

    Args:
        samples: Numbers of the samples, S of them.
    """

    def __init__(self, samples: Sequence[int]) -> None:
        self.samples = tuple(samples)

    @abstractmethod
    def of_tokens(self, width: int, kind: NoiseKind = "normal") -> Tensor:
        """Numbers of each token's own, `[S, tokens, width]` float32.

        Args:
            width: Number of numbers of a token.
            kind: Their distribution.
        """

    @abstractmethod
    def shared(self, width: int, kind: NoiseKind = "normal") -> Tensor:
        """Numbers that all tokens share, `[S, width]` float32; arguments as of `of_tokens`."""


class StepDraws(Draws):
    """The numbers of one call of a router in a training step: one sample.

    They are those of the real tokens alone, in their order, so that padding does not change them.

    Args:
        router: The router.
        num_tokens: Number of real tokens.
        seed: Seed, not negative; another one on each rank.
        step: Number of the step.
        call: Number of the router's call within the step.
        device: Device of the numbers.
    """

    def __init__(
        self, router: Router, num_tokens: int, *, seed: int, step: int, call: int, device: torch.device
    ) -> None:
        super().__init__([0])
        self._router, self._num_tokens, self._device = router, num_tokens, device
        self._seed, self._step, self._call = seed, step, call

    def of_tokens(self, width: int, kind: NoiseKind = "normal") -> Tensor:
        return self._drawn((self._num_tokens, width), kind)

    def shared(self, width: int, kind: NoiseKind = "normal") -> Tensor:
        return self._drawn((width,), kind)

    def _drawn(self, shape: Sequence[int], kind: NoiseKind) -> Tensor:
        key = {"seed": self._seed, "router": self._router.index, "step": self._step, "call": self._call}
        return step_noise(shape, kind=kind, **key).unsqueeze(0).to(self._device)


_STORED_FLOATS = 1 << 25


class PositionNoise:
    """The numbers of predictions by router, sample and position of the token.

    Those that were drawn are stored for the next batches, up to 128 MiB of them.

    Args:
        seed: Seed, not negative.
        antithetic: Whether each sample of odd number mirrors the one before.
    """

    def __init__(self, seed: int, *, antithetic: bool = True) -> None:
        self._seed, self._antithetic = seed, antithetic
        self._tables: dict[tuple[int, tuple[int, ...], int, NoiseKind, torch.device], Tensor] = {}

    def at(
        self,
        rows: TokenRows,
        router: Router,
        samples: Sequence[int],
        width: int | None = None,
        kind: NoiseKind = "normal",
    ) -> Tensor:
        """The numbers of the tokens of a router under each sample, `[S, R, T, width]` float32.

        Args:
            rows: Rows of the tokens, R of T.
            router: The router.
            samples: Numbers of the samples.
            width: Number of numbers of a token; by default the number of experts.
            kind: Their distribution.
        """
        return self._table(rows, router, samples, width, kind)[:, rows.positions]

    def of_copies(
        self,
        rows: TokenRows,
        router: Router,
        samples: Sequence[int],
        width: int | None = None,
        kind: NoiseKind = "normal",
    ) -> Tensor:
        """The numbers where the rows are a copy for each sample, one after another: `[R, T, width]` float32.

        Raises:
            RuntimeError: If the number of rows is no multiple of the number of samples.
        """
        number, copies = len(rows.positions), len(samples)
        check_copies(number, copies)
        copy = torch.arange(number, device=rows.positions.device) // (number // copies)
        return self._table(rows, router, samples, width, kind)[copy.unsqueeze(1), rows.positions]

    def shared(self, router: Router, samples: Sequence[int], width: int, kind: NoiseKind = "normal") -> Tensor:
        """Numbers of each sample that all tokens share, `[S, width]` float32 on the CPU."""
        return self._drawn((width,), router, samples, kind)

    def _table(
        self, rows: TokenRows, router: Router, samples: Sequence[int], width: int | None, kind: NoiseKind
    ) -> Tensor:
        """`[S, L, width]`, with L positions or more."""
        width = router.num_experts if width is None else width
        key = router.index, tuple(samples), width, kind, rows.positions.device
        table = self._tables.get(key)
        if table is None or table.shape[1] < rows.num_positions:
            # Rounded up, so that a slightly longer batch does not draw them again.
            length = 1 << max(rows.num_positions - 1, 0).bit_length()
            table = self._drawn((length, width), router, samples, kind).to(rows.positions.device)
            if table.numel() + sum(stored.numel() for stored in list(self._tables.values())) <= _STORED_FLOATS:
                self._tables[key] = table
        return table

    def _drawn(self, shape: Sequence[int], router: Router, samples: Sequence[int], kind: NoiseKind) -> Tensor:
        return sample_noise(
            shape, seed=self._seed, router=router.index, samples=samples, kind=kind, antithetic=self._antithetic
        )


class SampleDraws(Draws):
    """The numbers of some samples of a prediction.

    Args:
        noise: The noise.
        router: The router.
        rows: Rows of the tokens that the router got.
        samples: Numbers of the samples.
        copies: Whether the rows are a copy of a batch for each sample, one after another: then numbers of tokens are
            `[1, tokens, width]`, each token's those of its copy's sample.
        device: Device of the numbers.
    """

    def __init__(
        self,
        noise: PositionNoise,
        router: Router,
        rows: TokenRows,
        samples: Sequence[int],
        *,
        copies: bool,
        device: torch.device,
    ) -> None:
        super().__init__(samples)
        self._noise, self._router, self._rows = noise, router, rows
        self._copies, self._device = copies, device

    def of_tokens(self, width: int, kind: NoiseKind = "normal") -> Tensor:
        if self._copies:
            numbers = self._noise.of_copies(self._rows, self._router, self.samples, width, kind).unsqueeze(0)
        else:
            numbers = self._noise.at(self._rows, self._router, self.samples, width, kind)
        return numbers.flatten(1, 2).to(self._device)

    def shared(self, width: int, kind: NoiseKind = "normal") -> Tensor:
        return self._noise.shared(self._router, self.samples, width, kind).to(self._device)


def check_copies(num_rows: int, copies: int) -> None:
    """Check that rows may be copies of a batch.

    Raises:
        RuntimeError: If their number is no multiple of the number of copies.
    """
    if num_rows % copies:
        raise RuntimeError(
            f"the model ran on {num_rows} rows, which are no {copies} copies of a batch; compute one sample at a time"
        )
