"""SWAG: a Gaussian fitted to the weights after the last epochs; predictions are averaged over its samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bmoe_lightning.methods.base import State
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.snapshots import opened_snapshot, swapped_weights
from bmoe_lightning.methods.weight_ensemble import WeightEnsemble, check_alike
from bmoe_lightning.methods.workbench import Workbench

_SEED, _DIGESTS = "seed", "digests"


@dataclass(frozen=True)
class SWAG(WeightEnsemble):
    """Averages the probabilities of samples from a Gaussian fitted to the snapshots of the trained weights.

    With the mean `m`, the variances `v` and the deviations `D` (one row per snapshot) of K snapshots, a sample is
    `m + sqrt(v / 2) z + D^T u / sqrt(2 (K - 1))` with standard normal `z` and `u`. Maddox et al. 2019, A Simple
    Baseline for Bayesian Uncertainty in Deep Learning, eq. 1; deviations are from the final mean, not the running one.
    The moments are taken from the files of the snapshots when weights are sampled, one tensor at a time: a sample and
    K + 3 float32 copies of the largest tensor are held in memory. The files must be those of the fit.

    Raises:
        ValueError: If there are fewer than 2 snapshots or samples.
    """

    name: str = "swag"
    label: str = "SWAG"
    num_snapshots: int = option(5, "Number of snapshots: the weights after each of the last epochs.")
    num_samples: int = option(10, "Number of weight samples to average over.", prediction_only=True, trial=2)

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

    def check_run(
        self,
        model: nn.Module,
        folder: Path | None,
        *,
        ranks_per_node: int = 1,
        trained: Sequence[nn.Parameter] | None = None,
    ) -> None:
        """Check that a sample fits into the free memory.

        Raises:
            ValueError: If it does not.
        """
        counts = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        size = 4 * (sum(counts) + (self.num_snapshots + 3) * max(counts, default=0))
        memory = free_memory()
        free = None if memory is None else memory // ranks_per_node
        if free is not None and size > free:
            raise ValueError(
                f"a sample of {self.name} takes {size / 2**30:.1f} GiB for {sum(counts):,} trained weights, "
                f"{max(counts):,} of them in the largest tensor, and there are {free / 2**30:.1f} GiB of free memory "
                "for each process; train fewer weights, lower num_snapshots, or remove the method"
            )

    def fit(self, work: Workbench) -> State:
        paths = work.snapshots[-self.num_snapshots :]
        if len(paths) < 2:
            raise ValueError(
                f"{self.name} needs snapshots of the trained weights after at least 2 epochs, and there are "
                f"{len(paths)}; train for more epochs, or remove the method"
            )
        check_alike(self.name, paths)
        return {_SEED: torch.tensor(work.seed), _DIGESTS: _digests(paths)}

    def check_state(self, state: State) -> None:
        seed, digests = state.get(_SEED), state.get(_DIGESTS)
        if seed is None or seed.dtype != torch.int64 or seed.dim():
            raise ValueError("it lacks the seed")
        if digests is None or digests.dtype != torch.uint8 or digests.dim() != 2 or digests.shape[1] != 32:
            raise ValueError(f"{_DIGESTS!r} must be uint8 and of the shape [K, 32]")
        if not 2 <= len(digests) <= self.num_snapshots:
            raise ValueError(f"it has {len(digests)} snapshots, which must be 2 to {self.num_snapshots}")
        super().check_state(state)

    def members(
        self, model: nn.Module, state: State, snapshots: Sequence[Path]
    ) -> Sequence[AbstractContextManager[None]]:
        count = len(state[_DIGESTS])
        paths = snapshots[-count:]
        if len(paths) < count:
            raise ValueError(
                f"{self.name} was fitted to {count} snapshots, and there are {len(paths)}; pass those of its fit"
            )
        check_alike(self.name, paths)
        differing = (_digests(paths) != state[_DIGESTS]).any(1).nonzero().flatten().tolist()
        if differing:
            raise ValueError(
                f"the content of {paths[differing[0]]} is not that to which {self.name} was fitted; pass the snapshots "
                "of its fit in their order, or fit again"
            )
        samples = SnapshotGaussian(paths, int(state[_SEED]))
        return [_member(model, samples, index) for index in range(self.num_samples)]

    def hyperparameters(self, state: State) -> dict[str, float]:
        return {"members": self.num_samples, "snapshots": len(state[_DIGESTS])}


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
            weights = {
                name: _drawn((file.read(name, verify=verify) for file in files), shared, generator)
                for name in files[0].shapes
            }
        self._verified = digests
        return weights


def _drawn(snapshots: Iterable[Tensor], shared: Tensor, generator: torch.Generator) -> Tensor:
    """A sample of one tensor, given the factors of the deviations, `[K]`; its memory is freed before the next one."""
    mean, variance, deviations = moments(snapshots, len(shared))
    noise = torch.randn(mean.shape, generator=generator)
    return noise.mul_(variance.div_(2).sqrt_()).add_(mean).add_(torch.tensordot(shared, deviations, dims=1))


def moments(snapshots: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of one tensor of K snapshots, float32; no more than K + 2 copies of it are held.

    Args:
        snapshots: The tensor in each snapshot, `[...]`.
        count: Their number K.

    Returns:
        Mean `[...]`, variances `[...]` over K, and deviations from the mean `[K, ...]`.
    """
    rows: Tensor | None = None
    for place, value in enumerate(snapshots):
        if rows is None:
            rows = torch.empty(count, *value.shape)
        rows[place] = value
    assert rows is not None
    mean = rows.mean(0)
    rows -= mean
    variance = torch.zeros_like(mean)
    for row in rows:
        variance.addcmul_(row, row, value=1 / count)
    return mean, variance, rows


@contextmanager
def _member(model: nn.Module, samples: SnapshotGaussian, index: int) -> Iterator[None]:
    with swapped_weights(model, samples.sample(index)):
        yield


def _digests(paths: Sequence[Path]) -> Tensor:
    """The SHA-256 digests of the tensors of snapshots, `[K, 32]` uint8."""
    found = []
    for path in paths:
        with opened_snapshot(path) as file:
            found.append(list(bytes.fromhex(file.tensor_digest)))
    return torch.tensor(found, dtype=torch.uint8)


def free_memory() -> int | None:
    """Bytes of CPU memory available without swapping, or None where the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kibibytes[0] * 1024 if kibibytes else None
