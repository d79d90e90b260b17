"""Low-rank Kronecker-factored curvature of expert layers, collected in one pass over data."""

from bmoe_lightning.curvature.checkpoint import remove_checkpoint
from bmoe_lightning.curvature.factors import KroneckerFactors, LayerFactors
from bmoe_lightning.curvature.gradient_share import GradientShare
from bmoe_lightning.curvature.kfac import collect_factors
from bmoe_lightning.curvature.spec import Curvature, ExpertLayers, LayerSelection, LinearLayers, LoRALayers
from bmoe_lightning.curvature.texts import collect_text_factors

__all__ = [
    "Curvature",
    "ExpertLayers",
    "GradientShare",
    "KroneckerFactors",
    "LayerFactors",
    "LayerSelection",
    "LinearLayers",
    "LoRALayers",
    "collect_factors",
    "collect_text_factors",
    "remove_checkpoint",
]
