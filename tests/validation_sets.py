"""Covariance terms of validation sets with a dense reference, for the tests of their caches."""

import torch

from bmoe_lightning.laplace.covariance import BatchTerms, contrasts, covariance
from bmoe_lightning.laplace.slot_terms import LayerTerms
from bmoe_lightning.laplace.validation_cache import CacheBuilder

PRECISIONS = [(0.01, 0.01), (0.5, 20.0), (1e3, 1e3)]


def set_of(num_examples, num_classes, num_layers=2, seed=0, dtype=torch.float64):
    """Terms of batches of 8 examples of a random linearised model, its curvature, and the dense covariance."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width, rank, num_experts = 12, 4, 3
    head = normal(num_classes, width) / 20
    curvature = [(12 * torch.rand(num_experts, rank, rank, generator=generator).double() - 6).exp() for _ in "ab"]
    curvature = curvature[:num_layers]
    curvature[0][1, 0, 0] = 0
    batches = []
    for first in range(0, num_examples, 8):
        size = min(8, num_examples - first)
        logits = 2 * normal(size, num_classes)
        if num_classes > 3:
            logits[::3, 2] = -torch.inf
        present = logits != -torch.inf
        labels = torch.multinomial((logits / 3).softmax(1), 1, generator=generator).squeeze(1)
        weights, embedding = contrasts(present, True)
        layers = []
        for _ in range(num_layers):
            examples = torch.arange(size).repeat_interleave(2)
            experts = torch.randint(num_experts, (2 * size,), generator=generator)
            # G = g a^T of one slot; the bases are the first coordinates.
            a, mix = normal(2 * size, 7), 1 + 0.5 * normal(2 * size, 1, width)
            g = (weights.transpose(0, 1) @ head)[examples] * mix
            gradients = g.unsqueeze(3) * a[:, None, None]  # [2 B, P, width, 7]
            products = gradients.flatten(2) @ gradients.flatten(2).mT
            prior = torch.zeros(size, *products.shape[1:], dtype=torch.float64).index_add_(0, examples, products)
            projections = gradients[:, :, :rank, :rank].contiguous()
            layers.append(LayerTerms(prior, projections.to(dtype), examples, experts))
        batches.append(BatchTerms(logits, labels, embedding, tuple(layers)))

    def dense(precision):
        return torch.cat([covariance(batch, curvature, precision) for batch in batches])

    return batches, curvature, dense


def at(values):
    return torch.tensor(values, dtype=torch.float64)


def compact(batches, curvature, max_bytes=1 << 30):
    """Compact terms from the first batch on."""
    builder = CacheBuilder(curvature, max_bytes=max_bytes)
    builder._make_compact()
    for batch in batches:
        builder.add(batch)
    return builder.finish()
