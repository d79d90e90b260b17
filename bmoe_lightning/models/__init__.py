"""Model families that transformers does not have, so that their published weights load without code from the hub.

Importing this package makes them known to the Auto classes of transformers.
"""

from bmoe_lightning.models.deepseek_moe import (
    DeepseekForCausalLM,
    DeepseekModel,
    DeepseekMoeConfig,
    register_deepseek_moe,
)

__all__ = ["DeepseekForCausalLM", "DeepseekModel", "DeepseekMoeConfig", "register_deepseek_moe", "register_models"]


def register_models() -> None:
    """Make every family of this package known to the Auto classes of transformers. Calling it again changes nothing.

    A family that transformers, or the user, has registered under the same model type already is left as it is.
    """
    register_deepseek_moe()


register_models()
