"""Use a fine-tuned model with its fitted methods without Lightning: probabilities and scores of uncertainty."""

from bmoe_lightning.serving.calibrated_model import CalibratedModel
from bmoe_lightning.serving.manifest import MANIFEST_FILE, Manifest
from bmoe_lightning.serving.method_entries import UnknownMethodError, method_entry, method_of_entry
from bmoe_lightning.serving.predictions import ServedPredictions
from bmoe_lightning.serving.question_format import QuestionFormat

__all__ = [
    "MANIFEST_FILE",
    "CalibratedModel",
    "Manifest",
    "QuestionFormat",
    "ServedPredictions",
    "UnknownMethodError",
    "method_entry",
    "method_of_entry",
]
