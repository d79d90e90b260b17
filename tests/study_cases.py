"""Cases without a model: drawn logits, labels and covariance terms."""

from __future__ import annotations

from pathlib import Path

import torch

from bmoe_lightning.laplace.validation_cache import ValidationCache
from recipes.calibration_study.cases import Case, HeldOut

LAYERS, BINS, CLASSES = 2, 4, 4


def held_out(count: int, seed: int, temperature: float) -> HeldOut:
    """Questions of a model whose best temperature is about the given one."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
    roots = torch.randn(count, LAYERS, CLASSES - 1, 5, generator=generator, dtype=torch.float64)
    prior = roots @ roots.mT
    embedding = torch.eye(CLASSES, dtype=torch.float64)[:, 1:] - 1 / CLASSES
    # The curvature explains half of each layer's covariance, in equal parts of the bins.
    binned = (prior / (2 * BINS)).unsqueeze(2).expand(-1, -1, BINS, -1, -1).contiguous()
    centres = torch.logspace(-1, 2, BINS, dtype=torch.float64).expand(LAYERS, -1).contiguous()
    cache = ValidationCache(logits, labels, embedding.expand(count, -1, -1).contiguous(), prior, binned, centres)
    return HeldOut(cache)


def case(temperature: float = 2.5, seed: int = 0, task: str = "built-in", kind: str = "normal") -> Case:
    """A case with 120 calibration and 400 test questions."""
    precision = torch.full((LAYERS,), 5.0, dtype=torch.float64)
    parts = held_out(120, 2 * seed, temperature), held_out(400, 2 * seed + 1, temperature)
    return Case(task, kind, seed, *parts, {"layer": precision, "global": precision})


def measured_in(folder: Path) -> list[str]:
    """The files of finished measurements."""
    return sorted(path.name for path in folder.glob("*.json"))
