"""The low-rank Kronecker-factored Laplace posterior: evidence, prior precision and predictive."""

from bmoe_lightning.laplace.answer_scores import ANSWER_SCORES, AnswerScores, score_answers
from bmoe_lightning.laplace.attribution import Attribution, LayerAttribution
from bmoe_lightning.laplace.contrast_copies import copied_examples
from bmoe_lightning.laplace.posterior import LaplacePosterior, WeightMismatchError
from bmoe_lightning.laplace.predictive import Prediction
from bmoe_lightning.laplace.sequences import SequenceVariance
from bmoe_lightning.laplace.uncertainty_scores import relative_variance, uncertainty_scores

__all__ = [
    "ANSWER_SCORES",
    "AnswerScores",
    "Attribution",
    "LaplacePosterior",
    "LayerAttribution",
    "Prediction",
    "SequenceVariance",
    "WeightMismatchError",
    "copied_examples",
    "relative_variance",
    "score_answers",
    "uncertainty_scores",
]
