"""MAP: the fine-tuned model as it is."""

from __future__ import annotations

from torch import Tensor

from bmoe_lightning.methods.method import BatchView, Method


class MAP(Method):
    """The softmax of the model's own logits: the maximum a posteriori weights, and no uncertainty about them."""

    name = "map"
    label = "MAP"

    def log_probs(self, view: BatchView) -> Tensor:
        """Log-probabilities of one batch: `[B, K]` float64, `-inf` for absent classes."""
        return view.logits.log_softmax(-1)
