"""SWAG: a Gaussian fitted to the weights after the last epochs; predictions are averaged over its samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bmoe_lightning.methods.base import State, scalar
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.snapshots import opened_snapshot, swapped_weights
from bmoe_lightning.methods.weight_ensemble import WeightEnsemble, check_alike
from bmoe_lightning.methods.workbench import Workbench

_SEED, _COUNT = "seed", "snapshots"


@dataclass(frozen=True)
class SWAG(WeightEnsemble):
    """Averages the probabilities of samples from a Gaussian fitted to the snapshots of the trained weights.

    With the mean `m`, the variances `v` and the deviations `D` (one row per snapshot) of K snapshots, a sample is
    `m + sqrt(v / 2) z + D^T u / sqrt(2 (K - 1))` with standard normal `z` and `u`. Maddox et al. 2019, A Simple
    Baseline for Bayesian Uncertainty in Deep Learning, eq. 1; deviations are from the final mean, not the running one.
    The moments are taken from the files of the snapshots when weights are sampled, one tensor at a time, so that
    nothing but a sample is held in memory.

    Raises:
        ValueError: If there are fewer than 2 snapshots or samples.
    """

    name: str = "swag"
    label: str = "SWAG"
    num_snapshots: int = option(5, "Number of snapshots: the weights after each of the last epochs.")
    num_samples: int = option(10, "Number of weight samples to average over.", prediction_only=True, trial=2)

    positive_state = (_COUNT,)
    source = "https://arxiv.org/abs/1902.02476"
    cost = "`num_samples` forward passes, each with other weights, for which all snapshots are read"

    def __post_init__(self) -> None:
        if self.num_snapshots < 2:
            raise ValueError(f"{self.name} needs at least 2 snapshots, got num_snapshots={self.num_snapshots}")
        if self.num_samples < 2:
            raise ValueError(f"{self.name} needs at least 2 samples, got num_samples={self.num_samples}")

    @property
    def needs(self) -> Needs:
        return Needs(snapshots=2, max_snapshots=self.num_snapshots)

    def fit(self, work: Workbench) -> State:
        count = len(work.snapshots[-self.num_snapshots :])
        if count < 2:
            raise ValueError(
                f"{self.name} needs snapshots of the trained weights after at least 2 epochs, and there are "
                f"{count}; train for more epochs, or remove the method"
            )
        return {_SEED: torch.tensor(work.seed), _COUNT: scalar(count)}

    def check_state(self, state: State) -> None:
        if _SEED not in state or state[_SEED].dtype != torch.int64 or state[_SEED].dim():
            raise ValueError("it lacks the seed")
        super().check_state(state)
        if float(state[_COUNT]) not in range(2, self.num_snapshots + 1):
            raise ValueError(f"{_COUNT!r} must be one of 2 to {self.num_snapshots}, and is {float(state[_COUNT]):g}")

    def members(
        self, model: nn.Module, state: State, snapshots: Sequence[Path]
    ) -> Sequence[AbstractContextManager[None]]:
        count = int(state[_COUNT])
        paths = snapshots[-count:]
        if len(paths) < count:
            raise ValueError(
                f"{self.name} was fitted to {count} snapshots, and there are {len(paths)}; pass those of its fit"
            )
        check_alike(self.name, paths)
        samples = SnapshotGaussian(paths, int(state[_SEED]))
        return [_member(model, samples, index) for index in range(self.num_samples)]

    def hyperparameters(self, state: State) -> dict[str, float]:
        return {"members": self.num_samples, _COUNT: float(state[_COUNT])}


class SnapshotGaussian:
    """The Gaussian of SWAG over the trained weights, whose moments are those of snapshot files.

    Args:
        paths: The snapshots, at least two with the same tensors.
        seed: Seed of the samples.
    """

    def __init__(self, paths: Sequence[Path], seed: int) -> None:
        self._paths = tuple(paths)
        self._seed = seed
        self._verified: list[str] = []

    def sample(self, index: int) -> dict[str, Tensor]:
        """One sample of the trained weights by parameter name, float32 on the CPU.

        Args:
            index: Index of the sample; equal indices give equal weights.

        Raises:
            FileNotFoundError: If a snapshot is missing.
            ValueError: If one is damaged; the first sample verifies all of them.
        """
        # One random stream per sample: members are created lazily, and each must be the same in every pass.
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        count = len(self._paths)
        shared = torch.randn(count, generator=generator) / math.sqrt(2 * (count - 1))
        with ExitStack() as stack:
            files = [stack.enter_context(opened_snapshot(path)) for path in self._paths]
            digests = [file.digest for file in files]
            verify = digests != self._verified
            weights = {}
            for name in files[0].shapes:
                mean, variance, deviations = moments([file.read(name, verify=verify) for file in files])
                noise = torch.randn(mean.shape, generator=generator)
                weights[name] = mean + (variance / 2).sqrt() * noise + torch.tensordot(shared, deviations, dims=1)
        self._verified = digests
        return weights


def moments(snapshots: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of one tensor of K snapshots, float32.

    Args:
        snapshots: The tensor in each snapshot, `[...]`.

    Returns:
        Mean `[...]`, variances `[...]` over K, and deviations from the mean `[K, ...]`.
    """
    rows = torch.stack([value.float() for value in snapshots])
    mean = rows.mean(0)
    deviations = rows - mean
    return mean, deviations.square().mean(0), deviations


@contextmanager
def _member(model: nn.Module, samples: SnapshotGaussian, index: int) -> Iterator[None]:
    with swapped_weights(model, samples.sample(index)):
        yield
