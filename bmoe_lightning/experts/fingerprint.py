"""A fingerprint of a model's MoE blocks, so that a posterior is never used with other weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bmoe_lightning.experts.layout import ExpertLayer

_SAMPLES = 64


def weight_fingerprint(model: nn.Module, layers: Sequence[ExpertLayer]) -> str:
    """Hash a sample of every MoE block's weights: experts and router, 64 values of each matrix of each expert.

    Reading 14 billion weights would take longer than it is worth; training moves practically all entries of a matrix
    that it moves at all. Values are compared as float32, so a checkpoint and its exact copy in a wider dtype agree,
    while a copy rounded to a narrower dtype does not. Names are relative to the block: a model has the same fingerprint
    inside a LightningModule and outside.

    Args:
        model: the model.
        layers: its expert layers.

    Returns:
        A hexadecimal SHA-256 digest.
    """
    digest = hashlib.sha256()
    for layer in layers:
        block = model.get_submodule(layer.name.rpartition(".")[0])
        samples = [(name, _sample(parameter.detach())) for name, parameter in sorted(block.named_parameters())]
        # One transfer a layer.
        values = torch.cat([sample.float() for _, sample in samples]).cpu()
        digest.update("\n".join(f"{name}:{len(sample)}" for name, sample in samples).encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _sample(parameter: Tensor) -> Tensor:
    """Evenly spaced values of a parameter; of every leading entry for a stack of matrices."""
    rows = parameter.reshape(len(parameter), -1) if parameter.dim() == 3 else parameter.reshape(1, -1)
    step = max(1, rows.shape[1] // _SAMPLES)
    return rows[:, ::step].flatten()
