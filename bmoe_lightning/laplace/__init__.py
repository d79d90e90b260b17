"""The low-rank Kronecker Laplace posterior: its evidence, its prior, its predictions."""

from bmoe_lightning.laplace.posterior import LaplacePosterior, WeightMismatchError
from bmoe_lightning.laplace.predictive import Prediction

__all__ = ["LaplacePosterior", "Prediction", "WeightMismatchError"]
