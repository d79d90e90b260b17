"""Methods that turn a model into class probabilities: one file a method, all of the same shape."""

from bmoe_lightning.methods.checkpoint_ensemble import CheckpointEnsemble
from bmoe_lightning.methods.deep_ensemble import DeepEnsemble
from bmoe_lightning.methods.ensemble import WeightEnsemble
from bmoe_lightning.methods.evidence_temperature import (
    EvidenceTemperature,
    ShrunkTemperature,
    fit_shrunk_temperature,
)
from bmoe_lightning.methods.laplace import LaplaceMethod, LaplaceTemperature
from bmoe_lightning.methods.map import MAP
from bmoe_lightning.methods.mc_dropout import MCDropout
from bmoe_lightning.methods.method import BatchView, Method, Predictions, average_log_probs, evaluate
from bmoe_lightning.methods.snapshots import apply_snapshot, save_snapshot, swapped_weights
from bmoe_lightning.methods.temperature import TemperatureScaling, fit_temperature

__all__ = [
    "MAP",
    "BatchView",
    "CheckpointEnsemble",
    "DeepEnsemble",
    "EvidenceTemperature",
    "LaplaceMethod",
    "LaplaceTemperature",
    "MCDropout",
    "Method",
    "Predictions",
    "ShrunkTemperature",
    "TemperatureScaling",
    "WeightEnsemble",
    "apply_snapshot",
    "average_log_probs",
    "evaluate",
    "fit_shrunk_temperature",
    "fit_temperature",
    "save_snapshot",
    "swapped_weights",
]
