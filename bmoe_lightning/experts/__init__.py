"""Expert layers: where they are in a model, and what flows through them."""

from bmoe_lightning.experts.dropout import expert_dropout
from bmoe_lightning.experts.fingerprint import weight_fingerprint
from bmoe_lightning.experts.layout import ExpertLayer, down_proj_parameters, find_expert_layers, squared_distances
from bmoe_lightning.experts.taps import ClassLogits, tapped_batch

__all__ = [
    "ClassLogits",
    "ExpertLayer",
    "down_proj_parameters",
    "expert_dropout",
    "find_expert_layers",
    "squared_distances",
    "tapped_batch",
    "weight_fingerprint",
]
