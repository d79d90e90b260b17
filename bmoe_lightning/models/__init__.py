"""Texts, their log-probabilities, and model families that transformers lacks: weights load without remote code.

Importing this package registers them with the Auto classes of transformers.
"""

from bmoe_lightning.models.deepseek_moe import (
    DeepseekForCausalLM,
    DeepseekModel,
    DeepseekMoeConfig,
    register_deepseek_moe,
)
from bmoe_lightning.models.generation import GeneratedAnswers, generate_answers, with_answers
from bmoe_lightning.models.sequence_logits import TextScores, sequence_log_prob, text_scores

__all__ = [
    "DeepseekForCausalLM",
    "DeepseekModel",
    "DeepseekMoeConfig",
    "GeneratedAnswers",
    "TextScores",
    "generate_answers",
    "register_deepseek_moe",
    "register_models",
    "sequence_log_prob",
    "text_scores",
    "with_answers",
]


def register_models() -> None:
    """Register every family of this package with the Auto classes of transformers. Idempotent.

    A model type that transformers or the user has registered already is not replaced.
    """
    register_deepseek_moe()


register_models()
