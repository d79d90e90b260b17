"""MAP: the fine-tuned model without uncertainty over its weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bmoe_lightning.methods.base import Method, State
from bmoe_lightning.methods.batch_view import BatchView


@dataclass(frozen=True)
class MAP(Method):
    """Softmax of the model's logits at the maximum a posteriori weights, without uncertainty over them."""

    name: str = "map"
    label: str = "MAP"

    def log_probs(self, batch: BatchView, state: State) -> Tensor:
        return batch.logits.log_softmax(-1)
