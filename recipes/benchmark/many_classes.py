"""What compact covariance terms cost in accuracy: `python -m recipes.benchmark.many_classes` prints a table.

Validation sets of random linearised models, small enough for exact terms too. LPO fits one precision a layer with both;
the NLL is that of the exact terms at either precision, with other noise.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bmoe_lightning.laplace.covariance import BatchTerms
from bmoe_lightning.laplace.prior import fit_lpo
from bmoe_lightning.laplace.slot_terms import LayerTerms
from bmoe_lightning.laplace.validation_cache import ValidationCache, cache_terms
from bmoe_lightning.utils.fit_warnings import FitWarning

_WIDTH, _RANK, _INPUTS, _EXPERTS, _BATCH = 24, 10, 16, 4, 16
_NUM_SAMPLES = 200
# Enough for the compact terms of all examples, and not for exact ones.
_FEW_BYTES = 1 << 20


@dataclass(frozen=True)
class ValidationSet:
    """Covariance terms of a random linearised model, whose labels ask for wider predictions.

    Attributes:
        num_classes: Number of classes K.
        num_examples: Number of examples N.
        num_layers: Number of layers L.
        seed: Seed of the model and its data.
    """

    num_classes: int
    num_examples: int = 64
    num_layers: int = 2
    seed: int = 0

    def curvature(self) -> list[Tensor]:
        """Eigenvalues of each layer, `[E, r, r]`, over eight decades."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (_EXPERTS, _RANK, _RANK)
        return [
            (18 * torch.rand(shape, generator=generator, dtype=torch.float64) - 8).exp() for _ in range(self.num_layers)
        ]

    def batches(self) -> Iterator[BatchTerms]:
        """The terms of each batch."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        count = self.num_classes
        head = normal(count, _WIDTH) / math.sqrt(_WIDTH)
        contrasts = torch.cat([-torch.ones(count - 1, 1), torch.eye(count - 1)], dim=1).double()
        embedding = (torch.eye(count) - 1 / count).double() @ torch.eye(count)[:, 1:].double()
        for first in range(0, self.num_examples, _BATCH):
            size = min(_BATCH, self.num_examples - first)
            logits = 4 * normal(size, _WIDTH) @ head.T
            labels = torch.multinomial((logits / 2.5).softmax(1), 1, generator=generator).squeeze(1)
            layers = []
            for _ in range(self.num_layers):
                examples = torch.arange(size).repeat_interleave(2)
                experts = torch.randint(_EXPERTS, (2 * size,), generator=generator)
                a = normal(2 * size, _INPUTS) / 20
                g = (contrasts @ head) * (1 + 0.3 * normal(2 * size, 1, _WIDTH))
                products = (g @ g.mT) * a.square().sum(1).view(-1, 1, 1)
                prior = torch.zeros(size, *products.shape[1:], dtype=torch.float64).index_add_(0, examples, products)
                projections = g[:, :, :_RANK, None] * a[:, None, None, :_RANK]
                layers.append(LayerTerms(prior, projections.float(), examples, experts))
            yield BatchTerms(logits, labels, embedding.expand(size, -1, -1), tuple(layers))


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    before = _peak_bytes()
    for num_classes in (30, 4):
        print(_large(ValidationSet(num_classes, num_examples=1000, num_layers=24)), flush=True)
        print(f"Peak of the process so far: {(_peak_bytes() - before) / 2**20:.0f} MiB above its start.\n", flush=True)
    print("| K | exact MiB | compact MiB | NLL, exact | NLL, compact | LPO s, exact | LPO s, compact |")
    print("| ---: " * 7 + "|")
    for num_classes in (4, 8, 12, 20, 30):
        print(_line(ValidationSet(num_classes)), flush=True)


def _line(data: ValidationSet) -> str:
    curvature = data.curvature()
    exact = cache_terms(data.batches(), curvature, max_bytes=1 << 40)
    compact = cache_terms(data.batches(), curvature, max_bytes=_FEW_BYTES)
    _, labels = exact.labelled()
    noise = exact.noise(2000, data.seed + 2)
    found = []
    for cache in (exact, compact):
        begin = time.process_time()
        precision = fit_lpo(cache, num_samples=_NUM_SAMPLES, seed=data.seed)
        found.append((float(exact.nll(precision, noise, labels)), time.process_time() - begin))
    (exact_nll, exact_s), (compact_nll, compact_s) = found
    return (
        f"| {data.num_classes} | {exact.nbytes / 2**20:.2f} | {compact.nbytes / 2**20:.2f} | {exact_nll:.4f} | "
        f"{compact_nll:.4f} | {exact_s:.1f} | {compact_s:.1f} |"
    )


def _large(data: ValidationSet) -> str:
    """Memory and time of a set whose exact terms are larger than the memory allows, or nearly so."""
    curvature = data.curvature()
    cache = cache_terms(data.batches(), curvature)
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)  # the labels of a random model ask for no precision in some layers
        fit_lpo(cache, seed=data.seed)
    return (
        f"{data.num_examples} examples, {data.num_classes} classes, {data.num_layers} layers: "
        f"{'exact' if isinstance(cache, ValidationCache) else 'compact'} terms {cache.nbytes / 2**20:.0f} MiB, "
        f"LPO {time.process_time() - begin:.1f} s"
    )


def _peak_bytes() -> int:
    """Largest resident size of this process so far, which Linux counts in KiB."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m recipes.benchmark.many_classes", description=__doc__).parse_args()
    main()
