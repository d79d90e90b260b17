"""Random numbers for routers that depend on what they are for, and never on how many were drawn before.

A number in a prediction depends on the seed, the router, the sample, the token's position in its row and the column:
not on the row, on the batch around it, nor on the samples that are computed together. All rows of a batch share their
numbers (common random numbers). The samples of one example are independent, which is all that its average over samples
needs; the errors of different examples are correlated. So a row gets the same numbers alone and in any batch, padded on
either side (positions count from its first real token, see `bmoe_lightning.routers.token_rows`), and the same sample
has the same numbers in every chunk. In training, rows have numbers of their own, by the number of the step: activations
that are recomputed get the same ones. Noise on the inputs of a model has numbers by row of the data, which are the same
in any batch.

The generator is Philox (https://doi.org/10.1145/2063384.2063405), on the CPU and in float32, whatever device and dtype
the model has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

NoiseKind = Literal["normal", "uniform", "gumbel"]
"""Standard normal, uniform in (0, 1), or standard Gumbel: `-log(-log u)` of a uniform u."""

_SAMPLES, _STEPS, _ROWS = 0, 1, 2


def sample_noise(
    shape: Sequence[int],
    *,
    seed: int,
    router: int,
    samples: Sequence[int],
    kind: NoiseKind = "normal",
    antithetic: bool = False,
) -> Tensor:
    """The random numbers of some samples of a prediction.

    Args:
        shape: Shape of the numbers of one sample: `(L, width)` for the tokens at positions 0 .. L - 1, or any shape for
            numbers that all tokens share. Fewer positions have the first of the numbers of more.
        seed: Seed, not negative.
        router: Index of the router.
        samples: Numbers of the samples, from 0.
        kind: Distribution of the numbers.
        antithetic: Whether each sample of odd number mirrors the one before, which makes averages over pairs more
            exact; each sample alone has the same distribution.

    Returns:
        `[S, *shape]` float32 on the CPU.
    """
    drawn: dict[int, Tensor] = {}
    found = []
    for sample in samples:
        source = sample - sample % 2 if antithetic else sample
        if source not in drawn:
            drawn[source] = _drawn(shape, (_SAMPLES, seed, router, source), kind)
        found.append(drawn[source] if source == sample else _mirrored(drawn[source], kind))
    return _transformed(torch.stack(found), kind) if found else torch.empty(0, *shape)


def step_noise(
    shape: Sequence[int], *, seed: int, router: int, step: int, call: int = 0, kind: NoiseKind = "normal"
) -> Tensor:
    """The random numbers of one training step, such as `[tokens, N]` for all tokens of a batch.

    Args:
        shape: Shape of the numbers.
        seed: Seed, not negative; another one on each rank.
        router: Index of the router.
        step: Number of the training step, from 0.
        call: Number of the router's call within the step, from 0.
        kind: Distribution of the numbers.

    Returns:
        `shape`, float32 on the CPU.
    """
    return _transformed(_drawn(shape, (_STEPS, seed, router, step, call), kind), kind)


def row_noise(shape: Sequence[int], *, seed: int, place: int, rows: Sequence[int]) -> Tensor:
    """Standard normal numbers of some rows of the data, independent of those of samples and steps.

    Args:
        shape: Shape of the numbers of one row: `(L, width)` for the tokens at positions 0 .. L - 1. Fewer positions
            have the first of the numbers of more.
        seed: Seed, not negative.
        place: Number of the place in the model.
        rows: Numbers of the rows, from 0.

    Returns:
        `[R, *shape]` float32 on the CPU.
    """
    found = [_drawn(shape, (_ROWS, seed, place, row), "normal") for row in rows]
    return torch.stack(found) if found else torch.empty(0, *shape)


def _drawn(shape: Sequence[int], key: Sequence[int], kind: NoiseKind) -> Tensor:
    # NumPy's generators fill an array in order, so that the beginning of a longer one is the same; torch's do not.
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    count = math.prod(shape)
    if kind == "normal":
        numbers = generator.standard_normal(count, dtype=np.float32)
    else:
        # The middle of 2^23 intervals: float32 has no number of this kind that rounds to 0 or 1.
        numbers = (generator.integers(1 << 23, size=count, dtype=np.uint32) + np.float32(0.5)) / np.float32(1 << 23)
    return torch.from_numpy(numbers.astype(np.float32)).view(*shape)


def _mirrored(numbers: Tensor, kind: NoiseKind) -> Tensor:
    return -numbers if kind == "normal" else 1 - numbers


def _transformed(numbers: Tensor, kind: NoiseKind) -> Tensor:
    """The numbers of a kind from those that `_drawn` gives for it: normal ones, or uniform ones."""
    return -(-numbers.log()).log() if kind == "gumbel" else numbers
