"""Methods that turn a model into class probabilities: one file a method, all of the same shape."""

from bmoe_lightning.baselines.checkpoint_ensemble import CheckpointEnsemble
from bmoe_lightning.baselines.deep_ensemble import DeepEnsemble
from bmoe_lightning.baselines.ensemble import WeightEnsemble
from bmoe_lightning.baselines.evidence_temperature import (
    EvidenceTemperature,
    ShrunkTemperature,
    fit_shrunk_temperature,
)
from bmoe_lightning.baselines.laplace import LaplaceMethod, LaplaceTemperature
from bmoe_lightning.baselines.map import MAP
from bmoe_lightning.baselines.mc_dropout import MCDropout
from bmoe_lightning.baselines.method import BatchView, Method, Predictions, average_log_probs, evaluate
from bmoe_lightning.baselines.snapshots import apply_snapshot, save_snapshot, swapped_weights
from bmoe_lightning.baselines.temperature import TemperatureScaling, fit_temperature

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
