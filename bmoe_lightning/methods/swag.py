"""SWAG: a Gaussian fitted to the weights after the last epochs; predictions are averaged over its samples."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bmoe_lightning.methods.base import Method, State
from bmoe_lightning.methods.batch_view import BatchView
from bmoe_lightning.methods.needs import Needs
from bmoe_lightning.methods.options import option
from bmoe_lightning.methods.snapshots import read_snapshot, swapped_weights
from bmoe_lightning.methods.workbench import Workbench

_SEED = "seed"
_PARTS = ("mean", "variance", "deviations")


@dataclass(frozen=True)
class SWAG(Method):
    """Averages the probabilities of samples from a Gaussian fitted to the snapshots of the trained weights.

    With the mean `m`, the variances `v` and the deviations `D` (one row per snapshot) of K snapshots, a sample is
    `m + sqrt(v / 2) z + D^T u / sqrt(2 (K - 1))` with standard normal `z` and `u`. Maddox et al. 2019, A Simple
    Baseline for Bayesian Uncertainty in Deep Learning, eq. 1; deviations are from the final mean, not the running one.
    The state stores `K + 2` numbers for each trained weight.

    Raises:
        ValueError: If there are fewer than 2 snapshots or samples.
    """

    name: str = "swag"
    label: str = "SWAG"
    num_snapshots: int = option(5, "Number of snapshots: the weights after each of the last epochs.")
    num_samples: int = option(10, "Number of weight samples to average over.", prediction_only=True, trial=2)

    source = "https://arxiv.org/abs/1902.02476"
    cost = "`num_samples` forward passes, each with other weights"

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
        """Check that the state fits into the free memory and onto the folder's disk.

        Raises:
            ValueError: If it does not.
        """
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        size = 4 * count * (self.num_snapshots + 2)
        memory, disk = free_memory(), None if folder is None else free_space(folder)
        for what, free in (("memory", None if memory is None else memory // ranks_per_node), ("disk", disk)):
            if free is not None and size > free:
                raise ValueError(
                    f"{self.name} takes {size / 2**30:.1f} GiB for {count:,} trained weights and {self.num_snapshots} "
                    f"snapshots, and there are {free / 2**30:.1f} GiB of free {what} for each process; train fewer "
                    "weights, lower num_snapshots, or remove the method"
                )

    def fit(self, work: Workbench) -> State:
        paths = work.snapshots[-self.num_snapshots :]
        if len(paths) < 2:
            raise ValueError(
                f"{self.name} needs snapshots of the trained weights after at least 2 epochs, and there are "
                f"{len(paths)}; train for more epochs, or remove the method"
            )
        snapshots = [read_snapshot(path) for path in paths]
        state = {_SEED: torch.tensor(work.seed)}
        for name in list(snapshots[0]):
            rows = torch.stack([snapshot.pop(name).float() for snapshot in snapshots])
            mean = rows.mean(0)
            deviations = rows - mean
            parts = (mean, deviations.square().mean(0), deviations)
            state |= {f"{part}/{name}": value for part, value in zip(_PARTS, parts, strict=True)}
        return state

    def check_state(self, state: State) -> None:
        names = [{key.partition("/")[2] for key in state if key.startswith(f"{part}/")} for part in _PARTS]
        if _SEED not in state or state[_SEED].dtype != torch.int64 or state[_SEED].dim():
            raise ValueError("it lacks the seed")
        if not names[0] or any(other != names[0] for other in names):
            raise ValueError("it lacks moments of some weights")
        for name in names[0]:
            mean, variance, deviations = (state[f"{part}/{name}"] for part in _PARTS)
            if any(value.dtype != torch.float32 for value in (mean, variance, deviations)):
                raise ValueError(f"the moments of {name!r} are not float32")
            counts = 2 <= len(deviations) <= self.num_snapshots if deviations.dim() else False
            if not counts or not mean.shape == variance.shape == deviations.shape[1:]:
                raise ValueError(f"the moments of {name!r} have shapes that do not fit together")
            if bool((variance < 0).any()):
                raise ValueError(f"{name!r} has negative variances")
        if len({len(state[f"{_PARTS[2]}/{name}"]) for name in names[0]}) > 1:
            raise ValueError("its moments are of different numbers of snapshots")
        super().check_state(state)

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        return batch.logits.log_softmax(-1)

    def members(
        self, model: nn.Module, state: State, snapshots: Sequence[Path]
    ) -> Sequence[AbstractContextManager[None]]:
        return [_member(model, state, index) for index in range(self.num_samples)]

    def hyperparameters(self, state: State) -> dict[str, float]:
        prefix = f"{_PARTS[2]}/"
        used = next((len(value) for key, value in state.items() if key.startswith(prefix)), 0)
        return {"members": self.num_samples, "snapshots": used}


def sample(state: State, index: int) -> dict[str, Tensor]:
    """One sample of the trained weights by parameter name, float32 on the CPU.

    Args:
        state: State from `SWAG.fit`.
        index: Index of the sample; equal indices give equal weights.
    """
    # One random stream per sample: members are created lazily, and each must be the same in every pass.
    generator = torch.Generator().manual_seed(int(state[_SEED]) * 1_000_003 + index)
    prefix = f"{_PARTS[0]}/"
    names = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    count = len(state[f"{_PARTS[2]}/{names[0]}"])
    shared = torch.randn(count, generator=generator) / math.sqrt(2 * (count - 1))
    weights = {}
    for name in names:
        mean, variance, deviations = (state[f"{part}/{name}"] for part in _PARTS)
        noise = torch.randn(mean.shape, generator=generator)
        weights[name] = mean + (variance / 2).sqrt() * noise + torch.tensordot(shared, deviations, dims=1)
    return weights


@contextmanager
def _member(model: nn.Module, state: State, index: int) -> Iterator[None]:
    with swapped_weights(model, sample(state, index)):
        yield


def free_memory() -> int | None:
    """Bytes of CPU memory available without swapping, or None where the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kibibytes[0] * 1024 if kibibytes else None


def free_space(folder: Path) -> int:
    """Bytes of free space on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
