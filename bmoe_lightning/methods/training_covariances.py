"""Covariance terms of some of the training examples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from bmoe_lightning.experts import ClassLogits
from bmoe_lightning.experts.counted_batch import CountedBatch, lockstep
from bmoe_lightning.experts.fsdp import runs_in_lockstep
from bmoe_lightning.laplace.covariance_cache import CovarianceCache
from bmoe_lightning.laplace.posterior import LaplacePosterior, posterior_terms
from bmoe_lightning.laplace.validation_cache import CacheBuilder
from bmoe_lightning.utils.distributed import failing_together, gather_number, num_processes


def training_terms(
    posterior: LaplacePosterior,
    model: nn.Module,
    class_logits: ClassLogits,
    batches: Iterable[Any],
    num_inputs: int,
    *,
    max_bytes: int,
    distributed: bool = False,
) -> CovarianceCache:
    """The covariance terms of the first training examples, from as many whole batches as it takes to have them.

    Args:
        posterior: The posterior.
        model: The model.
        class_logits: Function `(model, batch) -> (logits [B, K], labels [B])`.
        batches: Training batches of this rank.
        num_inputs: Number of examples of all ranks; more to the end of a batch, and at most all.
        max_bytes: Memory of the terms; see `CacheBuilder`.
        distributed: Whether all ranks of torch.distributed's default group call this, each with its shard of the data.

    Raises:
        ValueError: If the data are empty, or have no labels.
    """
    shards = num_processes() if distributed else 1
    builder = CacheBuilder(posterior.curvature, max_bytes=max_bytes, num_shards=shards)
    left = math.ceil(num_inputs / shards)
    with failing_together(distributed=distributed):
        for batch in lockstep(model, batches):
            (terms,) = posterior_terms([posterior], model, class_logits, batch)
            builder.add(terms)
            size = batch.size if isinstance(batch, CountedBatch) else len(terms.logits)
            # Ranks in lockstep end together, though their batches may differ in size.
            left -= min(gather_number(size)) if runs_in_lockstep(model) else size
            if left <= 0:
                break
    cache = builder.finish(distributed=distributed)
    if cache.labels is None:
        raise ValueError(
            "labels of training examples are needed, but class_logits returned None for them; return (logits, labels)"
        )
    return cache
