"""Expert layers: where they are in a model, and what flows through them."""

from bmoe_lightning.experts.adapted import register_experts
from bmoe_lightning.experts.batches import CountedBatch
from bmoe_lightning.experts.dropout import expert_dropout
from bmoe_lightning.experts.fingerprint import weight_fingerprint
from bmoe_lightning.experts.layer import ExpertLayer
from bmoe_lightning.experts.layout import (
    down_proj_parameters,
    expert_parameters,
    find_expert_layers,
    find_linear_layers,
    second_weights,
    squared_distances,
)
from bmoe_lightning.experts.taps import ClassLogits, tapped_batch

__all__ = [
    "ClassLogits",
    "CountedBatch",
    "ExpertLayer",
    "down_proj_parameters",
    "expert_dropout",
    "expert_parameters",
    "find_expert_layers",
    "find_linear_layers",
    "register_experts",
    "second_weights",
    "squared_distances",
    "tapped_batch",
    "weight_fingerprint",
]
