"""Expert layers: find them in a model, and record their activations and gradients."""

from bmoe_lightning.experts.counted_batch import CountedBatch
from bmoe_lightning.experts.discovery import find_expert_layers, find_linear_layers
from bmoe_lightning.experts.dropout import expert_dropout
from bmoe_lightning.experts.fingerprint import weight_fingerprint
from bmoe_lightning.experts.layouts.registered import register_experts
from bmoe_lightning.experts.logits_contract import ClassLogits
from bmoe_lightning.experts.tapped_batches import tapped_batch
from bmoe_lightning.experts.threads import model_lock
from bmoe_lightning.experts.types import ExpertLayer
from bmoe_lightning.experts.weights import (
    down_proj_parameters,
    down_proj_weights,
    expert_parameters,
    squared_distances,
)

__all__ = [
    "ClassLogits",
    "CountedBatch",
    "ExpertLayer",
    "down_proj_parameters",
    "down_proj_weights",
    "expert_dropout",
    "expert_parameters",
    "find_expert_layers",
    "find_linear_layers",
    "model_lock",
    "register_experts",
    "squared_distances",
    "tapped_batch",
    "weight_fingerprint",
]
