"""Model families that transformers lacks, so that their published weights load without remote code.

Importing this package registers them with the Auto classes of transformers.
"""

from bmoe_lightning.models.deepseek_moe import (
    DeepseekForCausalLM,
    DeepseekModel,
    DeepseekMoeConfig,
    register_deepseek_moe,
)

__all__ = ["DeepseekForCausalLM", "DeepseekModel", "DeepseekMoeConfig", "register_deepseek_moe", "register_models"]


def register_models() -> None:
    """Register every family of this package with the Auto classes of transformers. Idempotent.

    A model type that transformers or the user has registered already is not replaced.
    """
    register_deepseek_moe()


register_models()
